"""A checkpoint as rules look at it: its headers, its config, the names of its files, and how it is to be spread."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from k2quant.checkpoint.reader import Checkpoint
from k2quant.checkpoint.weights import StoredWeight, group_tensors
from k2quant.conversion.metadata.config import quantization_of
from k2quant.conversion.metadata.promises import Inventory, inventory, language_config
from k2quant.errors import CheckpointError
from k2quant.formats.format import Format
from k2quant.ground import names

PLAIN = ""
"""What `packed` says of weights that are not quantised."""


class Kind(NamedTuple):
    """Weights that are alike in all but layer and number: whatever a rule finds in the first holds for all."""

    weight: StoredWeight
    """The first of them."""
    name: str
    """Their class, one of `names.TENSOR_CLASSES`."""
    packed: str
    nbytes: int
    """Of all of them."""
    served: bool
    """Whether engines load them: those of layers for multi-token prediction they leave out."""

    @property
    def last(self) -> str:
        """The last part of their bases, such as `kv_b_proj`."""
        return last(self.weight.base)

    @property
    def label(self) -> str:
        """Their format, in words."""
        return self.weight.format.label if self.packed and self.weight.format else "not quantised"


@dataclass(frozen=True, slots=True)
class Subject:
    """A checkpoint, and the devices that are to run it."""

    checkpoint: Checkpoint
    weights: list[StoredWeight]
    kinds: list[Kind]
    """The kinds of its weights."""
    problems: list[CheckpointError]
    """What does not fit together: no rule but one looks at such tensors."""
    found: Inventory
    files: frozenset[str]
    """Names of all files of the folder."""
    ranks: int
    """Devices that tensor parallelism spreads each matrix over."""
    memory: int | None
    """Bytes of each device; None: not said."""
    context: int | None
    """Tokens of a sequence; None: as many as the config allows."""

    @property
    def config(self) -> dict[str, Any]:
        """What config.json says; empty where there is none."""
        return self.checkpoint.config or {}

    @property
    def text(self) -> Mapping[str, Any]:
        """The part of it that describes the language model."""
        return language_config(self.config)

    @property
    def block(self) -> dict[str, Any] | None:
        """What the config says of quantization, in all homes together; None where nothing is quantised.

        Raises:
            CheckpointError: two homes contradict each other, or one is no object.
        """
        return quantization_of(self.config) if any(self.quantised) else None

    @property
    def quantised(self) -> Iterator[Kind]:
        """The kinds of weights that are."""
        return (kind for kind in self.kinds if kind.packed)

    @property
    def remote(self) -> bool:
        """Whether its shards are elsewhere, so that headers alone are read."""
        return self.checkpoint.supply is not None


def subject(
    checkpoint: Checkpoint, *, ranks: int = 1, memory: int | None = None, context: int | None = None
) -> Subject:
    """Return a checkpoint as rules look at it.

    Raises:
        OSError: its folder cannot be listed.
    """
    weights, problems = group_tensors(checkpoint.tensors)
    supply = checkpoint.supply
    files = frozenset(path.name for path in checkpoint.folder.iterdir()) | frozenset(
        () if supply is None else supply.place.files
    )
    has = inventory(weights)
    layers = number(language_config(checkpoint.config or {}), "num_hidden_layers")
    return Subject(checkpoint, weights, _kinds(weights, has, layers), problems, has, files, ranks, memory, context)


def _kinds(weights: Iterable[StoredWeight], has: Inventory, layers: int | None) -> list[Kind]:
    found: dict[tuple[object, ...], Kind] = {}
    for weight in weights:
        layer = names.layer(weight.main.name)
        served = layer is None or not (layer in has.predictors or (layers is not None and layer >= layers))
        dtypes = tuple(entry.dtype for entry in weight.parts.values())
        alike = (
            names.tensor_class(weight.main.name),
            weight.format and weight.format.label,
            weight.shape,
            dtypes,
            served,
        )
        key = *alike, last(weight.base), names.spelling(weight.base)
        kind = found.get(key)
        if kind is None:
            kind = Kind(weight, str(alike[0]), packed(weight.format), 0, served)
        found[key] = kind._replace(nbytes=kind.nbytes + weight.nbytes)
    return list(found.values())


def packed(stored: Format | None) -> str:
    """Return how a weight is packed, with its layout where there are several; `PLAIN` for what is not quantised."""
    if stored is None or not stored.quantised:
        return PLAIN
    return " ".join((stored.packing, *(str(getattr(stored, "layout", "")) for _ in stored.layouts[1:2])))


def unit(stored: Format | None) -> tuple[int, int]:
    """Return the rows and columns of a weight that share a scale; of what has none, one of each."""
    if packed(stored) == PLAIN or stored is None:
        return 1, 1
    scales: Any = stored.scales
    first, second = scales if isinstance(scales, tuple) else (scales, None)
    return (int(first), second) if isinstance(second, int) else (1, int(first))


def number(text: Mapping[str, Any], key: str) -> int | None:
    """Return a positive number of a config; None where it has none, or nonsense."""
    value = text.get(key)
    return value if type(value) is int and 0 < value < 2**63 else None


def last(base: str) -> str:
    """Return the last part of a weight's base."""
    return names.split(base)[1]
