"""What a conversion will write, computed from headers alone.

A plan is pure data. `convert` obeys it, `--dry-run` prints it, and its shards are independent tasks: a cluster can give
each to another machine.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

from k2quant.checkpoint.files.paths import check_inside
from k2quant.checkpoint.header import TensorEntry, build_header
from k2quant.checkpoint.panels import PANEL_WEIGHTS, PIECE_BYTES, ROW_STEP
from k2quant.checkpoint.reader import CONFIG, INDEX, Checkpoint
from k2quant.checkpoint.weights import Weight, group_tensors
from k2quant.conversion import config
from k2quant.conversion.recipe import Policy, Scope, make_policy
from k2quant.errors import CheckpointError, ShapeMismatch, UnsafePath, UsageError
from k2quant.formats.dtypes import TensorSpec
from k2quant.formats.layouts import Format, FormatName, Int4
from k2quant.ground import names
from k2quant.ground.units import one_of
from k2quant.kernels.codecs.grids import Grid

REPORT = "k2quant_report.json"
INCOMPLETE = "INCOMPLETE"
"""A file that stands in the destination as long as it is not finished, and says so to whoever looks."""

_BASE_MEMORY = 220_000_000  # interpreter, numpy, numba and its codecs: whole conversions peaked at 190 MB, measured
_BYTES_PER_WEIGHT = 8  # of a panel in flight: at most 4 read (F32), 2 as BF16, 2 written


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked for; two runs with equal options write the same bytes.

    Raises:
        UsageError: a value that does not exist, or makes no sense.
    """

    to: FormatName
    scope: Scope | None = None
    """None: as Moonshot ships this format."""
    ignore: tuple[str, ...] = ()
    grid: Grid | None = None
    """None: moonshot."""
    shard_size: int | None = None
    """Bytes of tensor data; None: the source's shards."""

    def __post_init__(self) -> None:
        one_of("format", self.to, get_args(FormatName))
        if self.scope is not None:
            one_of("scope", self.scope, get_args(Scope))
        if self.grid is not None:
            one_of("grid", self.grid, get_args(Grid))
        if not isinstance(self.ignore, tuple) or not all(isinstance(pattern, str) for pattern in self.ignore):
            raise UsageError(f"ignore is {self.ignore!r}; expected a tuple of regular expressions")
        if self.shard_size is not None and (type(self.shard_size) is not int or self.shard_size < 1):
            raise UsageError(f"shard_size is {self.shard_size!r}; expected bytes, at least 1")


class Job(NamedTuple):
    """One weight on its way."""

    weight: Weight
    target: Format | None
    """None: copied byte for byte."""
    outputs: dict[str, TensorEntry]
    """Where its tensors will lie in the output shard, by suffix."""

    @property
    def output_main(self) -> TensorEntry:
        """The output tensor that carries the values."""
        layout = self.target or self.weight.format
        return self.outputs[layout.main] if layout else next(iter(self.outputs.values()))


class ShardPlan(NamedTuple):
    """One output shard."""

    file: str
    header: bytes
    """The first bytes of the file."""
    size: int
    """Bytes of the whole file."""
    jobs: tuple[Job, ...]

    @property
    def bytes_read(self) -> int:
        """Bytes of the source that its jobs read."""
        return sum(entry.nbytes for job in self.jobs for entry in job.weight.parts.values())


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole conversion."""

    source: Checkpoint
    policy: Policy
    options: Options
    shards: tuple[ShardPlan, ...]
    index: bytes
    """The output's index, whole."""
    config: bytes | None
    """The output's config.json, whole, or None where the source has none."""
    copies: tuple[str, ...]
    """Other files (tokenizer, code), by their path below the source, that are copied as they are."""
    left_out: tuple[str, ...]
    """Files that look like weights, which the index does not name, and which are not copied."""
    values: Mapping[str, Any] | None = None
    """What the values depend on that are not the source's own, as JSON has it; None where all are."""

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that are read."""
        return sum(shard.bytes_read for shard in self.shards)

    @property
    def bytes_written(self) -> int:
        """Bytes of the output, other files included."""
        copies = sum((self.source.folder / name).stat().st_size for name in self.copies)
        return sum(shard.size for shard in self.shards) + len(self.index) + len(self.config or b"") + copies

    def jobs(self) -> Iterator[Job]:
        """Yield every job, shard by shard."""
        return (job for shard in self.shards for job in shard.jobs)

    def peak_memory(self, workers: int) -> int:
        """Return an upper estimate of the resident memory in bytes; it does not grow with the model."""
        widest = max((job.weight.shape[-1] for job in self.jobs() if job.target and job.weight.shape), default=0)
        panel = max(PANEL_WEIGHTS, ROW_STEP * widest)
        headers = 2_000 * len(self.source.tensors)
        return _BASE_MEMORY + workers * max(_BYTES_PER_WEIGHT * panel, PIECE_BYTES) + headers


def make_plan(source: Checkpoint, options: Options) -> Plan:
    """Plan a conversion.

    Raises:
        CheckpointError: the source cannot be converted; every check that needs no weights has been made.
        UsageError: the options make no sense.
    """
    weights, problems = group_tensors(source.tensors)
    if problems:
        raise problems[0]
    config.check_source(source.config, weights)
    policy = make_policy(options.to, weights, scope=options.scope, ignore=options.ignore, grid=options.grid)
    shards = tuple(_shard(file, jobs) for file, jobs in _placed(weights, policy, options.shard_size))
    try:
        edited, (copies, left_out) = _config(source, shards, policy), other_files(source)
    except OSError as error:
        message = "cannot be read"
        raise CheckpointError(message, file=error.filename or source.folder, found=error.strerror) from error
    return Plan(source, policy, options, shards, _index(shards), edited, copies, left_out)


def output_specs(weight: Weight, target: Format | None) -> dict[str, TensorSpec]:
    """Return the tensors that a weight becomes, by suffix."""
    if target is None:
        return {suffix: TensorSpec(entry.dtype, entry.shape) for suffix, entry in weight.parts.items()}
    if target.name != "bf16" and (len(weight.shape) != 2 or not weight.main.nbytes):
        raise ShapeMismatch(
            "only a matrix can be quantised",
            tensor=weight.main.name,
            file=weight.main.file,
            expected="[N, K]",
            found=weight.shape,
            remedy="keep it out of the conversion with --ignore",
        )
    if isinstance(target, Int4):
        return target.state(weight.shape, name=weight.main.name)
    return target.state(weight.shape)


_Draft = list[tuple[Weight, Format | None, dict[str, TensorSpec]]]


def _placed(weights: Iterable[Weight], policy: Policy, shard_size: int | None) -> list[tuple[str, _Draft]]:
    """Return the output shards in order: the source's shards, or shards of at most `shard_size` bytes."""
    drafts = [
        (weight, target, output_specs(weight, target)) for weight in weights for target in (policy.target_of(weight),)
    ]
    if shard_size is None:
        by_file: dict[str, _Draft] = {}
        for draft in drafts:
            by_file.setdefault(draft[0].main.file, []).append(draft)
        return list(by_file.items())
    groups: list[_Draft] = []
    room = 0
    for draft in drafts:
        need = sum(spec.nbytes for spec in draft[2].values())
        if not groups or need > room:
            groups.append([])
            room = shard_size
        groups[-1].append(draft)
        room -= need
    return [(f"model-{number:05}-of-{len(groups):05}.safetensors", group) for number, group in enumerate(groups, 1)]


def _shard(file: str, drafts: _Draft) -> ShardPlan:
    def full_name(weight: Weight, suffix: str) -> str:
        return f"{weight.base}.{suffix}" if weight.base else suffix

    specs = {full_name(weight, suffix): spec for weight, _, state in drafts for suffix, spec in state.items()}
    header, spans = build_header(specs)
    jobs = tuple(
        Job(
            weight,
            target,
            {
                suffix: TensorEntry(name, spec.dtype, spec.shape, file, *spans[name])
                for suffix, spec in state.items()
                for name in (full_name(weight, suffix),)
            },
        )
        for weight, target, state in drafts
    )
    return ShardPlan(file, header, max((stop for _, stop in spans.values()), default=len(header)), jobs)


def _index(shards: tuple[ShardPlan, ...]) -> bytes:
    entries = [entry for shard in shards for job in shard.jobs for entry in job.outputs.values()]
    index = {
        "metadata": {"total_size": sum(entry.nbytes for entry in entries)},
        "weight_map": {entry.name: entry.file for entry in sorted(entries, key=lambda entry: entry.name)},
    }
    return _json(index)


def _config(source: Checkpoint, shards: tuple[ShardPlan, ...], policy: Policy) -> bytes | None:
    if source.config is None:
        if policy.target.name != "bf16":
            raise CheckpointError(
                "is not there, and a quantised checkpoint cannot be loaded without it",
                file=source.folder / CONFIG,
                remedy="take it from the model's release",
            )
        return None
    quantised: set[str] = set()
    kept: list[str] = []
    rounded = False
    for job in (job for shard in shards for job in shard.jobs):
        layout = job.target or job.weight.format
        if layout is None:
            continue
        rounded |= job.target is not None and job.weight.format is not None and job.weight.main.dtype in {"F16", "F32"}
        if layout.name == policy.target.name != "bf16":
            quantised.add(job.weight.base)
        elif len(job.weight.shape) == 2 and job.weight.main.nbytes:
            kept.append(job.weight.base)
    block = config.quantization_block(policy.target, quantised, kept)
    if block is None and not rounded and not config.quantization_blocks(source.config):
        return (source.folder / CONFIG).read_bytes()
    rounded &= policy.target.name == "bf16"  # else what is out of scope keeps its dtype
    return _json(config.edited(source.config, block, rounded_to_bf16=rounded))


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


_OWN = {CONFIG, REPORT, INCOMPLETE}  # written anew, or meant for the source alone
_NOTES = re.compile(r"k2quant_\w+\.(json|html|txt|lock)")  # what commands of ours say of the source's own folder
_WEIGHTS = re.compile(
    r".*\.safetensors(\.index\.json)?|.*\.(pt|pth|ckpt|pkl|gguf|partial)"
    r"|(pytorch_model|model|consolidated|adapter_model|tf_model|training_args|optimizer|scheduler).*\.bin(\.index\.json)?",
)


def other_files(source: Checkpoint) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the files beside the weights that are copied (tokenizer, code, licence), and the weights that are not.

    Hidden files and folders, and what is no file, are passed over.

    Raises:
        UnsafePath: one is a link that leaves the folder, or has a name that is not printable.
    """
    copied: list[str] = []
    left_out: list[str] = []
    expected = {INDEX, *source.shards}
    for folder, folders, files in os.walk(source.folder):
        here = Path(folder)
        taken = {name for name in folders if name in _OWN or _WEIGHTS.fullmatch(name)}  # a file of ours may go there
        left_out += sorted(str((here / name).relative_to(source.folder)) for name in taken)
        folders[:] = sorted(
            name for name in set(folders) - taken if not name.startswith(".") and not (here / name).is_symlink()
        )
        for path in (here / name for name in sorted(files) if not name.startswith(".")):
            below = str(path.relative_to(source.folder))
            if below in _OWN or below in expected or _NOTES.fullmatch(below):
                continue
            if _WEIGHTS.fullmatch(path.name):
                left_out.append(below)
                continue
            check_inside(source.folder, path)
            if not below.isprintable():  # journal and report could not name it
                raise UnsafePath("not a plain file name", file=repr(below), remedy="rename or remove it")
            if path.is_file():
                copied.append(below)
    return tuple(copied), tuple(left_out)


def describe(plan: Plan) -> dict[str, dict[str, int]]:
    """Count the weights of each class by what is done with them: `copied`, or `FORMAT -> FORMAT`."""
    table: dict[str, dict[str, int]] = {}
    for job in plan.jobs():
        done = "copied"
        if job.target is not None and job.weight.format is not None:
            done = f"{job.weight.format.name} -> {job.target.name}"
        row = table.setdefault(names.tensor_class(job.weight.main.name), {})
        row[done] = row.get(done, 0) + 1
    return {kind: table[kind] for kind in names.TENSOR_CLASSES if kind in table}
