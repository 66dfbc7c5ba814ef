"""What an export for mlx-lm will write: every byte's place, computed from headers and small files alone."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from k2quant.checkpoint.beside import PASSED_OVER, other_files
from k2quant.checkpoint.header import TensorEntry, build_header
from k2quant.checkpoint.panels import panel_shape
from k2quant.checkpoint.reader import CONFIG, INDEX, Checkpoint
from k2quant.checkpoint.weights import StoredWeight
from k2quant.conversion.metadata import carrying, relatives
from k2quant.conversion.metadata.config import edited
from k2quant.conversion.metadata.promises import language_config
from k2quant.conversion.placing import Job, ShardPlan, as_json
from k2quant.errors import CheckpointError, MalformedFile, UnsupportedFormat, UsageError
from k2quant.exports.exporting import Export
from k2quant.exports.heads import Heads
from k2quant.exports.mlx.modes import Choice, chosen
from k2quant.exports.mlx.names import HALVES, engine_of
from k2quant.exports.mlx.packed import GLOBAL, WEIGHT
from k2quant.exports.shapes import FILE, Sizes, rope_of
from k2quant.exports.stacks import Stack, stacks_of
from k2quant.formats.dtypes import TensorSpec
from k2quant.formats.format import Format
from k2quant.ground.names import tensor_class
from k2quant.ground.saying.showing import brief
from k2quant.ground.units import counted

SHARD_SIZE = 5_000_000_000
"""Bytes of tensors in a shard, where nobody asks for another size; mlx-lm's own have about as many (utils.py)."""

_OWN_DEFAULTS = (
    "num_experts_per_tok",
    "routed_scaling_factor",
    "norm_topk_prob",
    "n_group",
    "topk_group",
    "max_position_embeddings",
    "rms_norm_eps",
)
"""Keys for which mlx-lm has other defaults than transformers (`ModelArgs`, models/deepseek_v3.py), or none fits all."""

ENGINE = "mlx"
"""What reports call the engine."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked for; two runs with equal options write the same bytes.

    Raises:
        UsageError: a value that makes no sense.
    """

    shard_size: int = SHARD_SIZE
    """The most bytes of tensors in a shard; a layer's stack that is larger has its own."""

    def __post_init__(self) -> None:
        if type(self.shard_size) is not int or self.shard_size < 1:
            raise UsageError(f"shard_size is {self.shard_size!r}; expected bytes, at least 1")


class Row(NamedTuple):
    """Tensors of a class that are written in one mode."""

    kind: str
    """The class, of `names.TENSOR_CLASSES`."""
    source: str
    """The formats that they have."""
    mode: str
    tensors: int
    nbytes: int

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)


class MlxPlan(NamedTuple):
    """A whole export for mlx-lm."""

    export: Export
    """What the stream carries out, shard by shard."""
    listing: bytes
    """The output's index, whole."""
    config: bytes
    """Its config.json, whole."""
    copies: tuple[str, ...]
    """Other files (tokenizer, code), by their path below the source, that are copied as they are."""
    rows: tuple[Row, ...]
    """What becomes of which class of tensors."""
    fallback: Mapping[str, str]
    """Why a tensor does not keep the codes that it has, by its name."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    def remarked(self, text: str) -> MlxPlan:
        """Return the plan with one more remark; itself where there is nothing to say."""
        return self._replace(export=self.export.remarked(text))

    @property
    def last(self) -> dict[str, bytes]:
        """The small files that are written when all shards stand, by name, in their order: config.json comes last."""
        return {INDEX: self.listing, CONFIG: self.config}

    @property
    def beside(self) -> int:
        """Bytes of all files but the shards."""
        folder = self.export.source.folder
        return sum(map(len, self.last.values())) + sum((folder / name).stat().st_size for name in self.copies)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return self.export.bytes_written + self.beside


class _Made(NamedTuple):
    """A stack with what becomes of it."""

    stack: Stack
    choice: Choice
    names: Mapping[str, str]
    """What the arrays of its format are called, by suffix."""
    specs: Mapping[str, TensorSpec]
    """Of the whole tensors, by name."""

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())


def make_mlx_plan(source: Checkpoint, options: Options) -> MlxPlan:
    """Plan an export.

    Raises:
        CheckpointError: the source cannot be exported, or a file of it cannot be read; what no weight must be read for
            was checked.
    """
    config = source.config
    if config is None:
        raise MalformedFile("is not there, and mlx-lm loads no model without it", file=source.named(CONFIG))
    found = stacks_of(source, engine_of(config))
    _check_model(config, found.sizes)
    weights = [weight for stack in found.stacks for weight in stack.weights]
    carrying.check_decodable(config, weights)
    choices = chosen(found.stacks, found.sizes)
    made = [_made(*pair, found.sizes) for pair in zip(found.stacks, choices, strict=True)]
    shards = _shards(made, options.shard_size)
    try:
        beside = other_files(source)
        copies = source.stamps(beside.copied)
    except OSError as error:
        raise CheckpointError("cannot be read", file=error.filename or source.place, found=error.strerror) from error
    why = {each.names[WEIGHT]: each.choice.why for each in made if each.choice.why}
    text = as_json(_config(config, made))
    remarks = (
        *found.remarks,
        *_left(beside.left_out, beside.passed_over),
        *relatives.remarks(config, weights),
        *_unused(weights),
        *(f"{name} does not keep its codes: {reason}{_more(why)}" for name, reason in list(why.items())[:1]),
    )
    identity = {
        "export": ENGINE,
        "options": {"shard_size": options.shard_size},
        "source": source.fingerprint() | {"other_files": copies},
        "headers": {shard.file: hashlib.sha256(shard.header).hexdigest() for shard in shards},
        "config": hashlib.sha256(text).hexdigest(),
    }
    export = Export(source, shards, identity, remarks)
    return MlxPlan(export, _index(shards, made), text, beside.copied, tuple(_rows(made)), why)


def _check_model(config: Mapping[str, Any], sizes: Sizes) -> None:
    """Refuse what mlx-lm's model does not have.

    Raises:
        MalformedFile: config.json leaves open what mlx-lm has a value of its own for.
        UnsupportedFormat: so it is.
    """
    text = language_config(config)
    for key in _OWN_DEFAULTS:
        if text.get(key) is None:
            raise MalformedFile(f"{key} is not there, and mlx-lm would take another value than the model's", file=FILE)
    if sizes.tied:
        raise UnsupportedFormat(
            "tie_word_embeddings, and mlx-lm's deepseek_v3 has a head of its own", file=FILE, expected=False, found=True
        )


def _made(stack: Stack, choice: Choice, sizes: Sizes) -> _Made:
    """Say which tensors a stack becomes."""
    place, first = stack.place, stack.first
    state = _state(choice.format, first)
    if isinstance(choice.format, Heads):
        layer, heads = place.tensor.rpartition(".")[0], sizes.num_attention_heads
        inner = (sizes.kv_lora_rank, sizes.qk_nope_head_dim), (sizes.v_head_dim, sizes.kv_lora_rank)
        names = {suffix: f"{layer}.{half}.weight" for suffix, half in zip(Heads.mains, HALVES, strict=True)}
        of = zip(state.values(), inner, names.values(), strict=True)
        specs = {name: TensorSpec(spec.dtype, (heads, *shape)) for spec, shape, name in of}
        return _Made(stack, choice, {**names, WEIGHT: names[Heads.mains[0]]}, specs)
    names = {suffix: f"{place.tensor}.{suffix}" if place.suffix else place.tensor for suffix in state}
    experts = (len(stack.weights),) if stack.is_stacked else ()
    specs = {
        names[suffix]: TensorSpec(spec.dtype, (*experts, *(() if suffix == GLOBAL else spec.shape)))
        for suffix, spec in state.items()
    }
    return _Made(stack, choice, names if WEIGHT in names else {**names, WEIGHT: place.name}, specs)


def _state(target: Format | None, weight: StoredWeight) -> dict[str, TensorSpec]:
    """Return what a weight becomes, by suffix."""
    if target is None:
        return {suffix: TensorSpec(entry.dtype, entry.shape) for suffix, entry in weight.parts.items()}
    return target.state(panel_shape(weight.shape), name=weight.main.name)


def _shards(made: Iterable[_Made], most: int) -> tuple[ShardPlan, ...]:
    """Share tensors out among shards, in order, each as full as it may be."""
    groups: list[list[_Made]] = []
    room = 0
    for each in made:
        if not groups or each.nbytes > room:
            groups.append([])
            room = most
        groups[-1].append(each)
        room -= each.nbytes
    return tuple(
        _shard(f"model-{number:05}-of-{len(groups):05}.safetensors", group) for number, group in enumerate(groups, 1)
    )


def _shard(file: str, group: list[_Made]) -> ShardPlan:
    header, spans = build_header({name: spec for each in group for name, spec in each.specs.items()})
    jobs = [job for each in group for job in _jobs(each, file, spans)]
    jobs.sort(key=lambda job: (job.weight.main.file, job.weight.main.start))
    return ShardPlan(file, header, max((stop for _, stop in spans.values()), default=len(header)), tuple(jobs))


def _jobs(each: _Made, file: str, spans: Mapping[str, tuple[int, int]]) -> Iterator[Job]:
    """Yield what writes tensors: a job for each expert, whose entries lie inside them."""
    for number, weight in enumerate(each.stack.weights):
        outputs = {}
        for suffix, spec in _state(each.choice.of(weight), weight).items():
            name = each.names[suffix]
            at = spans[name][0] + number * spec.nbytes
            label = f"{name}[{number}]" if each.stack.is_stacked else name
            outputs[suffix] = TensorEntry(label, *spec, file, at, at + spec.nbytes)
        yield Job(weight, each.choice.of(weight), outputs, weight.base)


def _index(shards: tuple[ShardPlan, ...], made: Iterable[_Made]) -> bytes:
    specs = {name: spec for each in made for name, spec in each.specs.items()}
    homes = {
        entry.name.partition("[")[0]: shard.file
        for shard in shards
        for job in shard.jobs
        for entry in job.outputs.values()
    }
    total = sum(spec.nbytes for spec in specs.values())
    return as_json({"metadata": {"total_size": total}, "weight_map": {name: homes[name] for name in sorted(specs)}})


def _config(config: dict[str, Any], made: Iterable[_Made]) -> dict[str, Any]:
    """Return the config, whose `quantization` says the mode of most layers, and by name that of the others.

    mlx-lm would find out by itself which layers are quantised (`infer_quant_config`); releases before 0.31 took the
    one mode for all of them.
    """
    found = {
        each.names[WEIGHT].removesuffix(".weight"): each.choice.params
        for each in made
        if each.choice.params is not None
    }
    copy = edited(config, None, rounded_to_bf16=False)
    copy.pop("quantization", None)
    _say_rope(cast("dict[str, Any]", language_config(copy)))  # which is of the copy
    if copy["model_type"] == "kimi_k2" and "auto_map" not in copy:
        copy["model_type"] = "deepseek_v3"  # which mlx-lm makes of it; transformers, whose tokenizers it uses, knows it
    if not found:
        return copy
    (most, _), *_ = Counter(tuple(params.items()) for params in found.values()).most_common()
    plain = {key: value for key, value in most if key != GLOBAL}
    return {**copy, "quantization": {**plain, **{name: params for name, params in found.items() if params != plain}}}


def _say_rope(text: dict[str, Any]) -> None:
    """Say where mlx-lm looks what a config says of the rotary embedding elsewhere.

    It reads `rope_theta`, for which it has 10000 where it is not there, and `rope_scaling`, and not what transformers 5
    writes: `rope_parameters`, or `rope_theta` inside of them (mlx-lm 0.32.2, models/deepseek_v3.py, `ModelArgs`).
    """
    said = rope_of(text)
    text["rope_theta"] = said["rope_theta"]
    if text.get("rope_parameters"):
        text["rope_scaling"] = said


def _left(left_out: tuple[str, ...], passed_over: tuple[str, ...]) -> Iterator[str]:
    if left_out:
        more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        yield (
            "not copied, for it holds weights that the index does not name, or says how these were quantised: "
            f"{relatives.shown(left_out[0])}{more}"
        )
    if passed_over:
        yield f"{PASSED_OVER}: {relatives.shown(passed_over[0])}"


def _unused(weights: Iterable[StoredWeight]) -> Iterator[str]:
    """Say of scales of inputs that go along with a weight that they are not written."""
    found = [weight for weight in weights if weight.format is not None and weight.format.scales_inputs]
    if found:
        count, such = counted(len(found), "weight"), relatives.shown(found[0].main.name)
        yield f"not written: scales of the inputs of {count}, such as {such}, for which mlx-lm has no use"


def _more(why: Mapping[str, str]) -> str:
    return f"; {counted(len(why), 'such tensor')}" if len(why) > 1 else ""


def _rows(made: Iterable[_Made]) -> Iterator[Row]:
    """Yield what becomes of which class, that with most bytes first."""
    table: dict[tuple[str, str, str], list[int]] = {}
    for each in made:
        labels = sorted({weight.format.label for weight in each.stack.weights if weight.format is not None})
        key = tensor_class(each.stack.first.main.name), " and ".join(labels), each.choice.label(each.stack)
        table.setdefault(key, []).append(each.nbytes)
    return (Row(*key, len(found), sum(found)) for key, found in sorted(table.items(), key=lambda item: -sum(item[1])))
