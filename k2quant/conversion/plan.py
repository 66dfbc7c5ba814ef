"""What a conversion will write, computed from headers alone.

A plan is pure data. `convert` obeys it, `--dry-run` prints it, and its shards are independent tasks: a cluster can give
each to another machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from k2quant.checkpoint.beside import PASSED_OVER, Beside, describes_quantization, other_files
from k2quant.checkpoint.files.strict_json import without_mark
from k2quant.checkpoint.panels import PANEL_WEIGHTS, PIECE_BYTES, ROW_STEP
from k2quant.checkpoint.reader import CONFIG, Checkpoint
from k2quant.checkpoint.weights import StoredWeight, group_tensors
from k2quant.conversion import config, relatives
from k2quant.conversion.carrying import Carried, carried
from k2quant.conversion.placing import Job, ShardPlan, as_json, index_of, place
from k2quant.conversion.promises import broken_promises, inventory
from k2quant.conversion.recipe import Recipe, make_recipe
from k2quant.errors import CheckpointError, UsageError
from k2quant.formats.format import Layout, Scope, listed
from k2quant.formats.known import FORMATS, FormatName
from k2quant.ground import names
from k2quant.ground.units import counted, one_of
from k2quant.kernels.codecs.grids import Grid

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
    layout: Layout | None = None
    """None: deepseek."""
    allow_split: bool = False
    """Whether what engines fuse may come out in several formats. A conversion's report says so, and another permission
    is another run; a training's job may change it, for it notes the weights themselves."""

    def __post_init__(self) -> None:
        one_of("format", self.to, tuple(FORMATS))
        if self.scope is not None:
            one_of("scope", self.scope, get_args(Scope))
        if self.grid is not None:
            one_of("grid", self.grid, get_args(Grid))
        if self.layout is not None:
            one_of("layout", self.layout, get_args(Layout))
        if not isinstance(self.ignore, tuple) or not all(isinstance(pattern, str) for pattern in self.ignore):
            raise UsageError(f"ignore is {self.ignore!r}; expected a tuple of regular expressions")
        if self.shard_size is not None and (type(self.shard_size) is not int or self.shard_size < 1):
            raise UsageError(f"shard_size is {self.shard_size!r}; expected bytes, at least 1")
        if type(self.allow_split) is not bool:
            raise UsageError(f"allow_split is {self.allow_split!r}; expected true or false")


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole conversion."""

    source: Checkpoint
    recipe: Recipe
    options: Options
    shards: tuple[ShardPlan, ...]
    index: bytes
    """The output's index, whole."""
    config: bytes | None
    """The output's config.json, whole, or None where the source has none."""
    copies: tuple[str, ...]
    """Other files (tokenizer, code), by their path below the source, that are copied as they are."""
    left_out: tuple[str, ...]
    """Files that are not copied: weights that the index does not name, and what other tools say of a quantization."""
    values: Mapping[str, Any] | None = None
    """What the values depend on that are not the source's own, as JSON has it; None where all are."""
    origin: Mapping[str, Any] | None = None
    """Where such values come from, for the report alone: by another name they are no other values."""
    remarks: tuple[str, ...] = ()
    """What is worth saying of source and output, though it stops nothing."""

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


def make_plan(source: Checkpoint, options: Options, *, substituted: bool = False) -> Plan:
    """Plan a conversion.

    Args:
        source: the checkpoint.
        options: what the user asked for.
        substituted: whether other values will take the place of the source's: what its config says of its codes is
            then no longer true of a weight that stays in its format.

    Raises:
        CheckpointError: the source cannot be converted; every check that needs no weights has been made.
        UsageError: the options make no sense.
    """
    weights, problems = group_tensors(source.tensors)
    if problems:
        raise problems[0]
    config.check_source(source.config, weights)
    recipe = make_recipe(
        options.to,
        weights,
        scope=options.scope,
        ignore=options.ignore,
        grid=options.grid,
        layout=options.layout,
    )
    return plan_of(source, weights, recipe, options, substituted=substituted)


def plan_of(
    source: Checkpoint, weights: list[StoredWeight], recipe: Recipe, options: Options, *, substituted: bool = False
) -> Plan:
    """Plan what a recipe says of a source's weights.

    Raises:
        CheckpointError: a weight cannot be stored so, no config can describe it, or a file cannot be read.
        UsageError: what engines fuse would be split.
    """
    splits = recipe.splits(weights)
    if not options.allow_split:
        recipe.check_splits(splits, weights)
    shards = place(weights, recipe, options.shard_size)
    try:
        found, rounded = _carried(source, shards, recipe, substituted=substituted)
        config_json = _config(source, found, rounded=rounded)
        beside = other_files(source)
    except OSError as error:
        message = "cannot be read"
        raise CheckpointError(message, file=error.filename or source.folder, found=error.strerror) from error
    if found.left:
        shards = place((w for w in weights if w.main.name not in found.left), recipe, options.shard_size)
    remarks = (
        *_remarks(source, beside),
        *relatives.remarks(source.config, weights),
        *broken_promises(source.config, inventory(weights)),
        *relatives.split_remarks(splits, "the output"),
        *recipe.remarks(weights),
        *found.remarks,
    )
    return Plan(
        source,
        recipe,
        options,
        shards,
        index_of(shards),
        config_json,
        beside.copied,
        beside.left_out,
        remarks=remarks,
    )


def _carried(
    source: Checkpoint, shards: tuple[ShardPlan, ...], recipe: Recipe, *, substituted: bool
) -> tuple[Carried, bool]:
    """Return what of the source goes along with its weights, and whether floats of other dtypes become BF16."""
    if source.config is None and recipe.quantises:
        raise CheckpointError(
            "is not there, and a quantised checkpoint cannot be loaded without it",
            file=source.folder / CONFIG,
            remedy="take it from the model's release",
        )
    quantised: dict[str, list[str]] = {}
    kept: list[str] = []
    rounded = False
    jobs = [job for shard in shards for job in shard.jobs]
    for job in jobs:
        if job.written is None:
            continue
        rounded |= job.target is not None and job.weight.format is not None and job.weight.main.dtype in {"F16", "F32"}
        if job.written.quantised:
            quantised.setdefault(job.written.name, []).append(job.name)
        elif len(job.weight.shape) == 2 and job.weight.main.nbytes:
            kept.append(job.name)
    block = config.quantization_block({recipe.formats[name]: bases for name, bases in quantised.items()}, kept)
    rounded &= not recipe.quantises  # else what is out of scope keeps its dtype
    return carried(source.config, jobs, block, substituted=substituted), rounded


def _config(source: Checkpoint, found: Carried, *, rounded: bool) -> bytes | None:
    """Return the output's config.json, whole; None where the source has none."""
    if source.config is None:
        return None
    if found.block is None and not rounded and not config.quantization_blocks(source.config):
        # Whatever else stands there stays as it is; but engines read no file that begins with a byte-order mark.
        return without_mark(source.config_bytes(), file=source.folder / CONFIG)
    return as_json(config.edited(source.config, found.block, rounded_to_bf16=rounded))


def _remarks(source: Checkpoint, beside: Beside) -> Iterator[str]:
    """Say what of the source's files is not in the output."""
    weights = [name for name in beside.left_out if not describes_quantization(name)]
    if weights:
        yield f"left out, for the index does not name them: {listed(map(relatives.shown, weights))}"
    if described := [name for name in beside.left_out if name not in weights]:
        yield (
            "left out, for it describes another quantization than the output has: "
            f"{listed(map(relatives.shown, described))}"
        )
    if beside.passed_over:
        yield f"{PASSED_OVER}: {listed(map(relatives.shown, beside.passed_over))}"
    stale = frozenset(source.stale)
    if strays := [name for name in source.unlisted if name not in stale]:
        such, count = relatives.shown(strays[0]), counted(len(strays), "tensor")
        yield f"left out, for the index does not name them: {count} of the shards, such as {such}"
    if stale:
        such = relatives.shown(min(stale))
        copies = counted(len(stale), "old copy", "old copies")
        yield f"left out, for the index looks elsewhere for them: {copies}, such as {such}"


def describe(plan: Plan) -> dict[str, dict[str, int]]:
    """Count the weights of each class by what is done with them: `copied`, `relabelled`, or `FORMAT -> FORMAT`.

    A weight is relabelled whose codes and scales stay as they are, under other names or with scales widened to float32.
    """
    table: dict[str, dict[str, int]] = {}
    for job in plan.jobs():
        done = "copied"
        if job.target is not None and job.weight.format is not None:
            way = f"{job.weight.format.name} -> {job.target.name}"
            done = "relabelled" if job.weight.format.relabels(job.target) else way
        row = table.setdefault(names.tensor_class(job.weight.main.name), {})
        row[done] = row.get(done, 0) + 1
    return {kind: table[kind] for kind in names.TENSOR_CLASSES if kind in table}
