"""What a format has to say of itself: all that the rest of k2quant asks of one.

A weight is one matrix `[N, K]`, N output rows by K input columns. A format stores it as one tensor that carries the
values and, beside it, partners: scales, or the shape. Rows are worked on in panels, see `k2quant.checkpoint.panels`;
within a panel every array has the rows that belong to it. BF16 is the pivot of meaning: whatever a format stores stands
for BF16 values, and a format is written from them.

A format is a frozen dataclass. Its fields are what differs between weights of that format (a block, a group, the dtype
of a scale); class attributes hold for all of them. `k2quant.formats.known` lists the formats.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, get_args

from k2quant.errors import CheckpointError, MissingTensor, ShapeMismatch, UnsupportedFormat
from k2quant.formats.dtypes import TensorSpec

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from k2quant.formats.configs.keys import Key, Recast
    from k2quant.kernels.codecs.figures import Figures
    from k2quant.kernels.codecs.grids import Grid
    from k2quant.kernels.codecs.seam import Codecs
    from k2quant.kernels.codecs.values import F32, U16
    from k2quant.kernels.products.packed.weight import PackedWeight

Parts = dict[str, "NDArray[Any]"]
"""The arrays of a panel, or of a whole weight, by suffix."""

Scope = Literal["experts", "linear", "projections"]
"""`experts`: the routed experts; `linear`: every projection of the decoder layers that engines run in the format;
`projections`: every projection, whether engines run it or not."""

Layout = Literal["deepseek", "compressed-tensors", "modelopt"]
"""Whose names and config a format of several tools is written with; of those that a format has, `Format.layouts`, the
first is its default."""

Method = Literal["rtn", "mse", "imatrix", "gptq", "awq"]
"""How scales and codes are chosen, the default first: `rtn` by the format's own rule, rounding to nearest; `mse`,
scales searched for the least squared error; `imatrix`, searched for the least error of the outputs, by the mean and the
mean square of each column of the inputs, which a calibration saw; `gptq`, codes too, column by column, each of which
makes up for what those before it lost; `awq`, scales as `imatrix` has them, after powers of two were moved from the
rows of `up_proj` to the columns of `down_proj`."""


class Entry(Protocol):
    """What is known of a tensor before it is read."""

    @property
    def name(self) -> str:
        """In the checkpoint."""

    @property
    def dtype(self) -> str:
        """A key of `dtypes.DTYPES`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor itself."""

    @property
    def file(self) -> str:
        """The shard that holds it."""

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""


class Buffers(Protocol):
    """Memory of one thread, see `transcode.Scratch`."""

    def take(self, key: str, spec: TensorSpec) -> NDArray[Any]:
        """Return an array of this dtype and shape, with whatever content, until its key is asked for again."""


class Neighbours(NamedTuple):
    """A checkpoint's tensors, seen from one weight: those that share its base."""

    base: str
    tensors: Mapping[str, Entry]
    supported: str
    """What k2quant reads, for messages."""

    def get(self, suffix: str) -> Entry | None:
        """Return the tensor with this suffix, or None."""
        return self.tensors.get(f"{self.base}.{suffix}")

    def partner(self, suffix: str, weight: Entry) -> Entry:
        """Return a partner of a weight.

        Raises:
            MissingTensor: the index lacks it.
        """
        entry = self.get(suffix)
        if entry is None:
            raise MissingTensor(
                f"the index lacks this partner of `{weight.name}`",
                tensor=f"{self.base}.{suffix}",
                remedy="the checkpoint is incomplete: download it again",
            )
        return entry

    def foreign(self, entry: Entry, why: str = "belongs to a format that k2quant does not read") -> UnsupportedFormat:
        """Return the error that refuses a tensor by name."""
        found = f"{entry.dtype} {list(entry.shape)}"
        return UnsupportedFormat(why, tensor=entry.name, file=entry.file, expected=self.supported, found=found)


class Stored(NamedTuple):
    """A weight that a format has recognised."""

    format: Format
    shape: tuple[int, ...]
    """The logical shape; `[N, K]` for a quantised weight."""
    suffixes: tuple[str, ...]
    """Of the tensors that it is made of."""


class Format(ABC):
    """How a weight is stored."""

    name: ClassVar[str]
    """What the command line calls it."""
    mains: ClassVar[tuple[str, ...]]
    """Suffixes that the tensor which carries the values may have: one for each layout, or one for all."""
    whole: ClassVar[tuple[str, ...]] = ()
    """Those of `streamed` that every panel has whole, such as one scale for all rows, under whatever name a layout has
    for them; written with the first panel."""
    adopted: ClassVar[tuple[str, ...]] = ()
    """Suffixes of tensors that belong to a weight which `owns` them, and beside any other stand for themselves."""
    partners: ClassVar[tuple[str, ...]] = ()
    """Suffixes of tensors that mean nothing without the weight they belong to; those that are only refused, too."""
    quantised: ClassVar[bool] = True
    reads: ClassVar[str]
    """What of this format can be read, in words."""
    stands_for: ClassVar[str] = ""
    """Weights that a config promises by speaking of this format, and where it does, in words."""
    scheme_words: ClassVar[str] = ""
    """The scheme of a config group of compressed-tensors that means this format, in words."""
    packing: ClassVar[str] = ""
    """compressed-tensors' `format` of such a group: how the codes are packed."""
    method: ClassVar[str | None] = None
    """`quant_method` of a config that speaks of this format."""
    served: ClassVar[str] = "k2quant"
    """Engines that take it, by their documents and sources, as a model card says it."""
    keys: ClassVar[Mapping[str, Key] | None] = None
    """What is known of the block of `method`; None: `check_config` looks at all of it."""
    default_scope: ClassVar[Scope | None] = None
    """Which weights get it where nobody says; None: all of them."""
    unfit: ClassVar[tuple[str, ...]] = ()
    """Last names of projections that engines do not run in this format, and that the scope `linear` leaves out."""
    grids: ClassVar[tuple[str, ...]] = ()
    """Rounding rules that can be asked for."""
    layouts: ClassVar[tuple[str, ...]] = ()
    """Layouts that can be asked for; none where there is no choice."""
    trained: ClassVar[bool] = False
    """Whether QAT can train for it."""
    bit_widths: ClassVar[tuple[int, ...]] = ()
    """Widths of its codes that QAT can train for; none where there is no choice."""
    clips: ClassVar[bool] = False
    """Whether its plain rule clamps codes, so that their gradient can stop there."""
    searches: ClassVar[bool] = False
    """Whether better scales than the rule's can be searched; see `search`."""
    searched_grids: ClassVar[tuple[str, ...]] = ()
    """Of `grids`, those on which they can be."""
    surveyed: ClassVar[bool] = False
    """Whether a whole tensor must be seen before its first panel is written; see `survey`."""
    together: ClassVar[bool] = False
    """Whether weights that engines fuse share what `settled` decides."""
    searched_from: ClassVar[tuple[str, ...]] = ()
    """Names of formats from which scales are searched where nobody says by which method, for their values lie badly on
    this format's codes."""
    searched_by: ClassVar[tuple[Method, ...]] = get_args(Method)[1:]
    """Methods by which, of what `searches`."""
    takes_inputs: ClassVar[bool] = False
    """Whether a scale of the layer's inputs can stand beside a weight; see `with_inputs`."""
    ggml: ClassVar[str | None] = None
    """GGUF's type of tensors that has the same codes and scales in blocks of its own; None: there is none."""
    mlx: ClassVar[str | None] = None
    """The mode in which MLX keeps the codes and scales of this format; None: there is none."""
    carried_from: ClassVar[tuple[str, ...]] = ()
    """Names of formats whose codes are carried over, and refused where that would round them; see
    `rounding_allowed`."""

    # --- on disk ---

    @property
    def main(self) -> str:
        """Suffix of the tensor that carries the values."""
        return self.mains[0]

    @property
    @abstractmethod
    def streamed(self) -> tuple[str, ...]:
        """Suffixes of the tensors that are read and written panel by panel, in the codec's order; `main` comes first.

        In memory (`quantize`, packed weights) a weight is codes, scales, and for some formats a scale of the whole
        tensor: what `in_memory` streams.
        """

    @property
    def scale_suffix(self) -> str | None:
        """Suffix of the tensor in which a bad scale stands."""
        return None

    def suffix_of(self, part: str) -> str:
        """Return the suffix of the tensor in which a bad value stands, by `of` of `values.ValueAt`."""
        return self.scale_suffix if part == "scale" and self.scale_suffix is not None else self.main

    @abstractmethod
    def state(self, shape: tuple[int, ...], *, name: str = "weight") -> dict[str, TensorSpec]:
        """Return the tensors of a weight of this shape, by suffix.

        Args:
            shape: of the weight.
            name: of its main tensor, for the message.

        Raises:
            ShapeMismatch: no weight of this shape can be stored so.
        """

    def rows(self, suffix: str, start: int, stop: int) -> tuple[int, int]:
        """Return the rows of a tensor that belong to rows `start` to `stop` of the weight.

        `start` is a multiple of `row_step`, and so is `stop` unless it is the last row.
        """
        return start, stop

    @property
    def row_step(self) -> int:
        """Rows that share a scale: a panel begins at a multiple of them."""
        return 1

    def constant(self, shape: tuple[int, ...]) -> dict[str, bytes]:
        """Return the tensors that are not streamed, by suffix: they follow from the weight's shape."""
        return {}

    def misread(self, suffix: str, content: bytes, shape: tuple[int, ...]) -> object | None:
        """Return what a tensor that is not streamed says, where it contradicts the weight's shape; None: it agrees."""
        return None

    @property
    @abstractmethod
    def unit(self) -> object:
        """What must agree for a weight to be copied byte for byte into this format: a block, a group, a dtype."""

    @property
    def scales(self) -> object:
        """What shares a scale, and the scale's dtype where there is a choice."""
        return self.unit

    @property
    @abstractmethod
    def label(self) -> str:
        """Name and units, such as `int4 group 32`."""

    def in_words(self, bits: int) -> str:
        """Return what was trained for, as people read it; `bits` where the format has a choice."""
        return self.label

    @property
    def unwritable(self) -> str | None:
        """The dtype in which a source may be stored and nothing is ever written; None where all can be."""
        return None

    def same(self, other: Format) -> bool:
        """Tell whether a weight in this format is copied where the other one is asked for."""
        return self.name == other.name and self.unit == other.unit

    def relabels(self, other: Format) -> bool:
        """Tell whether the other format has the same codes and scales, under other names or in a wider dtype."""
        return False

    def relabel(self, parts: Parts, outputs: Parts, target: Format) -> None:
        """Fill a panel's arrays of a format that this one `relabels`, without rounding."""
        raise AssertionError(f"{self.label} has one layout: {target.label}")  # not asked

    def check_relabel(self, parts: Parts, target: Format) -> None:
        """Refuse what `relabel` would, by what every panel has `whole` alone, before anything is written.

        Raises:
            ValueAt: a number that cannot be said in the other format.
        """

    @property
    def along(self) -> tuple[str, ...]:
        """Suffixes of `streamed` that do not follow from the values: a source has them, and they go along with it."""
        return ()

    def pass_on(self, parts: Parts, outputs: Parts, target: Format) -> None:
        """Fill what goes `along` into a target from a panel's arrays in this format; for values that are others now."""
        raise AssertionError(f"nothing goes along from {self.label} to {target.label}")  # not asked

    @property
    def in_memory(self) -> Format:
        """This format as packed weights hold it: scales in the dtype that the products read."""
        return self

    @property
    def scales_inputs(self) -> bool:
        """Whether a scale of the layer's inputs stands beside a weight."""
        return False

    def with_inputs(self, largest: float | None) -> Format:
        """Return this format with a scale of the inputs; only for what `takes_inputs`.

        Args:
            largest: magnitude of an input, positive; None: the scale is 1.0.
        """
        raise AssertionError(f"{self.label} has no scale of inputs: {largest}")  # refused before

    def rounding_allowed(self) -> Format:
        """Return this format, for codes that may be rounded where they cannot be carried over."""
        return self

    @property
    def rounds(self) -> bool:
        """Whether codes that are carried over may be rounded."""
        return False

    def cache_scheme(self) -> dict[str, Any] | None:
        """Return what a config says of an FP8 cache of keys and values; None where it has no place for that."""
        return None

    def rounded_as(self, asked: Format) -> Format:
        """Return this format with the rounding rule of the one that was asked for, to write new values in it."""
        return self

    # --- recognising it ---

    @classmethod
    @abstractmethod
    def recognise(cls, suffix: str, entry: Entry, beside: Neighbours) -> Stored | None:
        """Return the weight whose main tensor this is; None if it is none of this format's.

        Raises:
            CheckpointError: it is one, but a partner is missing or does not fit.
        """

    @classmethod
    def owns(cls, suffix: str, beside: Neighbours) -> bool:
        """Tell whether a partner has its weight."""
        return suffix in cls.partners and any(beside.get(main) is not None for main in cls.mains)

    @classmethod
    def refusal(cls, suffix: str, entry: Entry, beside: Neighbours) -> CheckpointError | None:
        """Say why a tensor that no format takes is not read, where this format knows better than others."""
        return None

    @classmethod
    def asked_for(
        cls, stored: Iterable[tuple[Format, Entry]] = (), grid: Grid | None = None, layout: Layout | None = None
    ) -> Format:
        """Return the format to write, when its name is asked for and a checkpoint holds these weights.

        Args:
            stored: format and main tensor of each weight of the source.
            grid: the rounding rule that was asked for, if any; of `grids`.
            layout: the layout, likewise; of `layouts`.

        Raises:
            UnsupportedFormat: what the source holds cannot be written so.
        """
        return cls()

    # --- its values ---

    def extent(self, parts: Parts) -> tuple[int, int]:
        """Return rows and columns of the weights that a panel's arrays hold."""
        rows, columns = parts[self.main].shape
        return rows, columns

    def reading(self, parts: Parts) -> tuple[Any, ...]:
        """Return what a fused codec takes of a panel that it reads: the arrays, and what they are in units of."""
        return tuple(parts[suffix] for suffix in self.streamed)

    def writing(self, parts: Parts) -> tuple[Any, ...]:
        """Return what a fused codec takes of a panel that it writes: the rule, and the arrays to fill."""
        return tuple(parts[suffix] for suffix in self.streamed)

    @abstractmethod
    def decode(self, parts: Parts, out: U16, codecs: Codecs) -> None:
        """Write the BF16 bits `[R, K]` that a panel's arrays stand for.

        Raises:
            ValueAt: a value that no weight can have.
        """

    def values(self, parts: Parts, codecs: Codecs, scratch: Buffers) -> U16:
        """Return the BF16 bits `[R, K]` of a panel; a view of `parts` where they are BF16 already.

        Raises:
            ValueAt: a value that no weight can have.
        """
        weights: U16 = scratch.take("pivot", TensorSpec("BF16", self.extent(parts)))
        self.decode(parts, weights, codecs)
        return weights

    def encode(self, weights: U16, parts: Parts, codecs: Codecs) -> Figures:
        """Fill a panel's arrays with BF16 weights `[R, K]`: `choose`, then `store`, or both in one loop.

        Raises:
            ValueAt: a weight that cannot be stored.
        """
        return self.store(weights, self.choose(weights, codecs), parts, codecs)

    @abstractmethod
    def choose(self, weights: U16, codecs: Codecs) -> NDArray[Any]:
        """Return the scales that the rule of this format takes for BF16 weights `[R, K]`, as they are stored."""

    @abstractmethod
    def store(self, weights: U16, scales: NDArray[Any], parts: Parts, codecs: Codecs) -> Figures:
        """Fill a panel's arrays with BF16 weights `[R, K]` rounded at scales that are given, whoever chose them."""

    @property
    def candidates(self) -> int:
        """How many scales `search` tries for each that it returns; only for what `searches`."""
        raise AssertionError(f"{self.label} searches no scales")  # refused before

    def search(self, weights: U16, importance: F32 | None, codecs: Codecs, mean: F32 | None = None) -> NDArray[Any]:
        """Return scales with the least error for BF16 weights `[R, K]`, as they are stored; only for what `searches`.

        Args:
            weights: BF16 bits.
            importance: float32 `[K]`, what the squared error of each column counts, finite and at least 0: the mean
                square of its input; None: one.
            codecs: who does the arithmetic.
            mean: float32 `[K]`, the mean of each column's input, along which errors of columns add up; None: zeros.
        """
        raise AssertionError(f"{self.label} searches no scales: {weights.shape}")  # refused before

    def weighted_error(
        self,
        weights: U16,
        scales: NDArray[Any],
        importance: F32 | None,
        codecs: Codecs,
        mean: F32 | None = None,
    ) -> float:
        """Return what `store` at these scales would lose, by moments as in `search`, in float64; likewise.

        With a mean, errors add up over all columns of a row, not over a group's alone.
        """
        raise AssertionError(f"{self.label} searches no scales: {weights.shape}")  # refused before

    def survey(self, weights: U16, codecs: Codecs) -> object:
        """Return what must be known of a panel of BF16 weights before any panel of its weight is written."""
        return None

    def survey_of(self, source: Format, parts: Parts, codecs: Codecs, scratch: Buffers) -> object:
        """Return what `survey` says of a panel in a source's format.

        Raises:
            ValueAt: a value that no weight can have.
        """
        return self.survey(source.values(parts, codecs, scratch), codecs)

    def settled(self, surveys: list[object]) -> Format:
        """Return the format in which weights are written once they were surveyed.

        Args:
            surveys: of all panels of a weight in their order, or of all weights that share what is decided.

        Raises:
            UnsupportedFormat: what was found cannot be written without rounding, and that was not allowed.
        """
        return self

    def taking(self, source: Format) -> Format:
        """Return this format, which was asked for, with what stands beside a source's codes and goes along."""
        return self

    def restates(self, source: Format) -> bool:
        """Tell whether codes of a source are those of this format, which was settled, at scales that mean the same."""
        return False

    def restate(self, source: Format, parts: Parts, outputs: Parts, codecs: Codecs) -> Figures | None:
        """Fill a panel's arrays with codes of a source at scales of this format; only for what `restates`.

        A format that has the very arrays of the source may put these into `outputs`, in place of those to be filled.
        Nothing is returned where every value stays.

        Raises:
            ValueAt: a value that no weight can have.
        """
        raise AssertionError(f"{self.label} restates nothing of {source.label}")  # not asked

    @abstractmethod
    def outside(self, before: U16, after: U16, parts: Parts) -> int:
        """Count the weights of a panel that are further off than the rounding of this format explains.

        It needs no knowledge of who rounded: scales that are too large excuse nothing.

        Args:
            before: BF16 bits `[R, K]`.
            after: BF16 bits `[R, K]`, decoded from `parts`.
            parts: the panel's arrays in this format.
        """

    def unsolved(self, before: U16, after: U16, parts: Parts, codecs: Codecs) -> int:
        """Count the weights of a panel that are none of what solving gives, which moves weights by more than rounding.

        Scales are chosen for the weights as they were, before any is moved: a group at another one counts whole.

        Args:
            before: BF16 bits `[R, K]`.
            after: BF16 bits `[R, K]`, decoded from `parts`.
            parts: the panel's arrays in this format.
            codecs: who chooses plain scales.
        """
        return self.outside(before, after, parts)

    def steps(self, parts: Parts) -> NDArray[Any] | None:
        """Return the step of each group as float32 `[R, groups]`; None where codes do not lie at equal distances."""
        return None

    def codes_changed(self, after: Parts, before: Parts) -> int:
        """Count the weights whose codes, or bits in BF16, differ between two panels."""
        import numpy as np

        return int(np.count_nonzero(after[self.main] != before[self.main]))

    # --- the config beside it ---

    def config(self, quantised: Iterable[str], kept: list[str]) -> dict[str, Any] | None:
        """Return the `quantization_config` of a checkpoint in which this is the only quantised format.

        Args:
            quantised: the bases of the weights stored in it.
            kept: the bases of all other matrices.
        """
        return None

    @classmethod
    def companions(cls, block: Mapping[str, Any]) -> dict[str, bytes]:
        """Return the files beside config.json that say the same as an output's block of `method`, by name."""
        return {}

    def config_group(self) -> dict[str, Any] | None:
        """Return what a config group of compressed-tensors says of the weights; None if it cannot describe them."""
        return None

    def input_activations(self) -> dict[str, Any] | None:
        """Return what such a group says of a layer's inputs; None where they stay as they are."""
        return None

    @classmethod
    def claims(cls, scheme: Mapping[str, Any]) -> bool:
        """Tell whether a config group of compressed-tensors, by what it says of its weights, means this format.

        Only codes that are packed as `packing` says come here.
        """
        return False

    @classmethod
    def check_config(cls, block: Mapping[str, Any], stored: list[tuple[Format, tuple[int, ...]]]) -> None:
        """Refuse a config that contradicts the weights in this format.

        Args:
            block: the block of this format's `method`; of compressed-tensors, what a group says of its weights.
            stored: format and shape of each weight of this format.

        Raises:
            CheckpointError: it does.
        """

    @classmethod
    def carried(cls, fresh: dict[str, Any], source: Mapping[str, Any], recast: Recast) -> dict[str, Any]:
        """Return an output's block of this format's `method` with whatever of the source's is still true.

        Args:
            fresh: from `config`.
            source: the source's block, of the same method.
            recast: what becomes of the weights.
        """
        return fresh

    @classmethod
    def static_inputs(cls, block: Mapping[str, Any]) -> bool:
        """Tell whether a block of `method` has activations quantised at scales that stand in the checkpoint."""
        return False

    @classmethod
    def quantises_inputs(cls, block: Mapping[str, Any]) -> bool:
        """Tell whether by a block of `method`, or a config group, engines quantise the inputs of these weights."""
        return "quant_method" in block or bool(block.get("input_activations"))

    # --- in memory ---

    def unrunnable(self, shape: tuple[int, ...]) -> tuple[str, object] | None:
        """Return what the matrix products would need, and what is there; None where they can multiply by a weight."""
        return "a format with matrix products", self.label

    def packed(self, shape: tuple[int, ...], *, on: torch.device) -> PackedWeight:
        """Return a weight `[N, K]`, or a stack of them, without memory, in the layout in which a device reads it best.

        Only for what is quantised and not `unrunnable`.
        """
        raise AssertionError(f"{self.label} has no layout for {on} and {shape}")  # refused before

    # --- in training ---

    def fake_quantized(self, weights: torch.Tensor, bits: int, largest: torch.Tensor | None = None) -> torch.Tensor:
        """Return what BF16 `[R, K]` is rounded to by the plain rule, as BF16: what the forward pass of QAT sees.

        Only for what is `trained`, and for BF16.

        Args:
            weights: the masters, rounded to BF16.
            bits: width of the codes, where the format has a choice.
            largest: of a format that is `surveyed` and not settled: float32 `[]`, the largest magnitude of all matrices
                that share what `settled` decides. A tensor, so that nothing waits for a GPU.
        """
        raise AssertionError(f"{self.label} is not trained for: {weights.shape}, {bits} bits, {largest}")  # refused

    def inside(self, weights: torch.Tensor, bits: int, largest: torch.Tensor | None = None) -> torch.Tensor:
        """Tell which of the codes that `fake_quantized` rounds to were not clamped, bool `[R, K]`; of what `clips`."""
        raise AssertionError(f"{self.label} clamps no codes: {weights.shape}, {bits} bits, {largest}")  # refused

    def exported(self, weights: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
        """Return the streamed tensors of the same values, by suffix: what an export of QAT stores; likewise.

        A format that is `surveyed` is settled.
        """
        raise AssertionError(f"{self.label} is not trained for: {weights.shape}, {bits} bits")  # refused before


def matrix(entry: Entry) -> tuple[int, int]:
    """Return the shape of a matrix.

    Raises:
        ShapeMismatch: it is none, or empty.
    """
    if len(entry.shape) != 2 or not entry.nbytes:
        raise ShapeMismatch(
            "a quantised weight is a matrix", tensor=entry.name, file=entry.file, expected="[N, K]", found=entry.shape
        )
    return entry.shape[0], entry.shape[1]


def contradiction(claim: str, found: str) -> CheckpointError:
    """Return the error of a config that says what the tensors do not hold."""
    return CheckpointError(
        "quantization_config contradicts the tensors",
        file="config.json",
        expected=claim,
        found=found,
        remedy="take the config that belongs to these files",
    )


def listed(values: Iterable[object]) -> str:
    """Return values as one reads them."""
    return ", ".join(map(str, values))


def ceil_div(count: int, size: int) -> int:
    """Return how many pieces of `size` cover `count`."""
    return -(-count // size)
