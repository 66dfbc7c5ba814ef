"""What an export to GGUF will write: every byte's place, computed from headers, scales and small files alone."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import NamedTuple

from k2quant.checkpoint.header import TensorEntry
from k2quant.checkpoint.panels import panel_shape
from k2quant.checkpoint.reader import Checkpoint
from k2quant.checkpoint.remote.address import Address
from k2quant.conversion.placing import Job, ShardPlan
from k2quant.exports.exporting import Export
from k2quant.exports.gguf import blocks
from k2quant.exports.gguf.files import SUFFIX, FilePlan, Tensor, check_name, file_plans
from k2quant.exports.gguf.keys import keys, starting
from k2quant.exports.gguf.names import ENGINE, HALVES
from k2quant.exports.gguf.types import Choice, GgufOptions, chosen, survey, target
from k2quant.exports.gguf.vocabulary import vocabulary
from k2quant.exports.heads import Heads
from k2quant.exports.shapes import Sizes
from k2quant.exports.stacks import Stack, stacks_of
from k2quant.formats.dtypes import TensorSpec
from k2quant.ground.names import tensor_class
from k2quant.ground.pool import checked_workers
from k2quant.ground.saying.showing import brief
from k2quant.ground.units import counted, size

HUB_LIMIT = 50_000_000_000
"""Bytes of a file beyond which Hugging Face's hub asks for smaller ones (hub docs, repositories-recommendations)."""


class GgufPlan(NamedTuple):
    """A whole export to GGUF."""

    export: Export
    """What the stream carries out: a layer's share of a file is finished at a time."""
    files: tuple[FilePlan, ...]
    """What will stand there, the file to load first."""
    sections: Mapping[str, FilePlan]
    """The file of each shard, by the shard's name."""
    rows: tuple[Row, ...]
    """What becomes of which class of tensors."""
    fallback: Mapping[str, str]
    """Why a tensor is not in the type that its codes have, or that was asked for, by its name."""
    starting: Mapping[str, float]
    """What llama.cpp has to be told when it starts, see `keys.starting`."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    def remarked(self, text: str) -> GgufPlan:
        """Return the plan with one more remark; itself where there is nothing to say."""
        return self._replace(export=self.export.remarked(text))

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


class Row(NamedTuple):
    """Tensors of a class that are written in one type."""

    kind: str
    """The class, of `names.TENSOR_CLASSES`."""
    source: str
    """The formats that they have."""
    type: str
    tensors: int
    nbytes: int

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)


class _Written(NamedTuple):
    """A tensor of GGUF with what writes it."""

    tensor: Tensor
    stack: Stack
    choice: Choice
    part: str
    """Which of the arrays of a format it is; empty: the only one, under whatever name."""
    why: str
    """Why it is not in the type of its codes, or that was asked for."""


def make_gguf_plan(source: Checkpoint, file: str, options: GgufOptions, *, workers: int | None = None) -> GgufPlan:
    """Plan an export.

    Args:
        source: the checkpoint.
        file: name of the file, which ends in `.gguf`.
        options: what the user asked for.
        workers: threads that look at scales; None: one for each core.

    Raises:
        CheckpointError: the source cannot be exported; what no weight must be read for was checked, and all scales.
        UsageError: the name, or the size of parts, makes no sense.
    """
    check_name(file)
    found = stacks_of(source, ENGINE)
    unfit = survey(source, found.stacks, workers=checked_workers(workers))
    choices = chosen(found.stacks, found.sizes, options, unfit)
    groups = [tuple(_written(*pair, found.sizes)) for pair in zip(found.stacks, choices, strict=True)]
    written = [each for group in groups for each in group]
    config = source.config or {}
    metadata = (
        *keys(config, name=_name(source), file_type=_file_type(written)),
        *vocabulary(source.folder, config),
    )
    files = file_plans(file, metadata, [[each.tensor for each in group] for group in groups], options.split_size)
    sections, shards = _sections(files, written, found.sizes)
    why = {each.tensor.name: each.why for each in written if each.why}
    identity = {
        "export": SUFFIX.removeprefix("."),
        "options": options.as_json(),
        "source": source.fingerprint(),
        "headers": {each.name: hashlib.sha256(each.header).hexdigest() for each in files},
    }
    told = starting(config)
    export = Export(source, shards, identity, (*found.remarks, *_remarks(told, files, why)))
    return GgufPlan(export, files, sections, tuple(_rows(written)), why, told)


def _name(source: Checkpoint) -> str:
    """Return what the model is called: the last part of where it lies."""
    place = source.place
    return place.path.rstrip("/").rpartition("/")[2] if isinstance(place, Address) else place.resolve().name


def _written(stack: Stack, choice: Choice, sizes: Sizes) -> Iterator[_Written]:
    """Yield the tensors that a stack becomes."""
    place, shape = stack.place, stack.shape
    if choice.second is not None:
        layer, heads = place.tensor.rpartition(".")[0], sizes.num_attention_heads
        inner = (heads, sizes.kv_lora_rank, sizes.qk_nope_head_dim), (heads, sizes.v_head_dim, sizes.kv_lora_rank)
        for half, part, of, each in zip(HALVES, Heads.mains, (choice, choice.second), inner, strict=True):
            yield _Written(Tensor(f"{layer}.{half}.{place.suffix}", of.type, each), stack, choice, part, of.why)
        return
    experts = (len(stack.weights),) if stack.is_stacked else ()
    yield _Written(Tensor(place.name, choice.type, (*experts, *shape)), stack, choice, "", choice.why)
    if choice.type == blocks.NVFP4:
        stored = stack.first.format
        beside = (blocks.SCALE, blocks.INPUTS) if stored is not None and stored.scales_inputs else (blocks.SCALE,)
        for part in beside:
            yield _Written(Tensor(f"{place.tensor}.{part}", blocks.F32, experts or (1,)), stack, choice, part, "")


def _file_type(written: list[_Written]) -> int:
    """Return the file type of what is most of the bytes."""
    weights: Counter[blocks.Type] = Counter()
    for each in written:
        weights[each.tensor.type] += each.tensor.nbytes
    return max(weights, key=lambda of: (weights[of], of.number)).file_type


def _sections(
    files: tuple[FilePlan, ...], written: list[_Written], sizes: Sizes
) -> tuple[dict[str, FilePlan], tuple[ShardPlan, ...]]:
    """Return the parts in which files are finished, a layer's share of a file each, and the file of each part."""
    home = {tensor.name: (file, file.starts[tensor.name]) for file in files for tensor in file.tensors}
    of_layer = {name: list(group) for name, group in groupby(written, key=lambda each: _part_name(each.stack))}
    by_name = {file.name: file for file in files}
    sections: dict[str, FilePlan] = {}
    shards = []
    for layer, group in of_layer.items():
        jobs: dict[str, list[Job]] = {}
        stacks = {each.stack.place.name: each for each in group if each.part in {"", Heads.mains[0]}}
        for each in stacks.values():
            beside = {other.part: other.tensor for other in group if other.stack is each.stack}
            file = home[each.tensor.name][0].name
            jobs.setdefault(file, []).extend(_jobs(each, beside, home, sizes))
        for file, found in jobs.items():
            name = f"{file}#{layer}"
            sections[name] = by_name[file]
            ordered = sorted(found, key=lambda job: (job.weight.main.file, job.weight.main.start))
            nbytes = sum(entry.nbytes for job in found for entry in job.outputs.values())
            shards.append(ShardPlan(name, b"", nbytes, tuple(ordered)))
    return sections, tuple(shards)


def _part_name(stack: Stack) -> str:
    layer = stack.place.layer
    return stack.place.tensor if layer is None else f"blk.{layer}"


def _jobs(
    each: _Written, beside: Mapping[str, Tensor], home: Mapping[str, tuple[FilePlan, int]], sizes: Sizes
) -> Iterator[Job]:
    """Yield what writes a tensor, and those beside it: a job for each expert, whose entries lie inside the tensors."""
    for number, weight in enumerate(each.stack.weights):
        made = target(each.choice, weight, sizes)
        specs = {suffix: TensorSpec(entry.dtype, entry.shape) for suffix, entry in weight.parts.items()}
        if made is not None:
            specs = made.state(panel_shape(weight.shape), name=weight.main.name)
        outputs = {}
        for suffix, spec in specs.items():
            tensor = beside.get(suffix) or each.tensor
            file, start = home[tensor.name]
            label = f"{tensor.name}[{number}]" if each.stack.is_stacked else tensor.name
            at = start + number * spec.nbytes
            outputs[suffix] = TensorEntry(label, *spec, file.name, at, at + spec.nbytes)
        yield Job(weight, made, outputs, weight.base)


def _rows(written: Iterable[_Written]) -> Iterator[Row]:
    """Yield what becomes of which class, the classes in the order of the first tensor of each."""
    table: dict[tuple[str, str, str], list[int]] = {}
    for each in written:
        if each.part in {blocks.SCALE, blocks.INPUTS}:
            continue
        formats = sorted({weight.format.label for weight in each.stack.weights if weight.format is not None})
        key = (tensor_class(each.stack.first.main.name), " and ".join(formats), each.tensor.type.name)
        table.setdefault(key, []).append(each.tensor.nbytes)
    return (Row(*key, len(found), sum(found)) for key, found in sorted(table.items(), key=lambda item: -sum(item[1])))


def _remarks(told: Mapping[str, float], files: tuple[FilePlan, ...], why: Mapping[str, str]) -> Iterator[str]:
    if told:
        yield (
            f"tell llama.cpp {' and '.join(f'{name} {value:g}' for name, value in told.items())} when it starts, as "
            "config.json says: it does not read that from a file of this architecture, and computes other positions "
            "without it"
        )
    if why:
        name, reason = next(iter(why.items()))
        more = f"; {counted(len(why), 'such tensor')}" if len(why) > 1 else ""
        yield f"{name} is not in the type of its codes, or that was asked for: {reason}{more}"
    if (largest := max(files, key=lambda file: file.size)).size > HUB_LIMIT:
        yield (
            f"{largest.name} has {size(largest.size)}, and Hugging Face's hub takes files up to {size(HUB_LIMIT)}: to "
            "put it there, write it in parts with `split_size=`"
        )
