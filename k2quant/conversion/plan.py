"""What a conversion will write, computed from headers alone.

A plan is pure data. `convert` obeys it, `--dry-run` prints it, and its shards are independent tasks: a cluster can give
each to another machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from k2quant.checkpoint.beside import PASSED_OVER, Beside, describes_quantization, other_files
from k2quant.checkpoint.files.strict_json import without_mark
from k2quant.checkpoint.panels import PANEL_WEIGHTS, PIECE_BYTES, ROW_STEP
from k2quant.checkpoint.reader import CONFIG, Checkpoint
from k2quant.checkpoint.weights import StoredWeight, group_tensors
from k2quant.conversion import config, relatives
from k2quant.conversion.carrying import Carried, carried
from k2quant.conversion.placing import Job, ShardPlan, as_json, index_of, place
from k2quant.conversion.promises import broken_promises, inventory
from k2quant.conversion.recipes.recipe import Recipe, make_recipe
from k2quant.conversion.recipes.rules import METHODS, WrittenRecipe, WrittenRule, in_force, recipe_from
from k2quant.errors import CheckpointError, UsageError
from k2quant.formats.format import Layout, Method, Scope, listed
from k2quant.formats.known import FORMATS, FormatName
from k2quant.ground import names
from k2quant.ground.saying.showing import brief
from k2quant.ground.units import counted
from k2quant.kernels.codecs.grids import Grid

_BASE_MEMORY = 220_000_000  # interpreter, numpy, numba and its codecs: whole conversions peaked at 190 MB, measured
_BYTES_PER_WEIGHT = 8  # of a panel in flight: at most 4 read (F32), 2 as BF16, 2 written


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked for; two runs with equal options write the same bytes.

    It is one format, with what belongs to it, or a list of rules.

    Raises:
        UsageError: a value that does not exist, or makes no sense.
    """

    to: FormatName | None = None
    """None: `rules` say it."""
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

    rules: tuple[WrittenRule, ...] = ()
    """What a recipe says that `to`, `scope`, `ignore`, `grid`, `layout` and `method` cannot say; the first that takes a
    weight counts."""
    method: Method | None = None
    """None: rtn."""
    budget: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)
    """Why the rules are as they are, as JSON has it, where errors were weighed against bytes: for the report alone.
    Another choice has other rules."""

    def __post_init__(self) -> None:
        if self.rules and (given := self._said()):
            raise UsageError(f"a recipe says in its rules what {listed(f'`{name}=`' for name in given)} would")
        if self.to is None and not self.rules:
            raise UsageError("say which format to write, `to=`, or by which recipe, `recipe=`")
        if not isinstance(self.ignore, tuple):
            raise UsageError(f"ignore is {self.ignore!r}; expected a tuple of regular expressions")
        if self.shard_size is not None and (type(self.shard_size) is not int or self.shard_size < 1):
            raise UsageError(f"shard_size is {self.shard_size!r}; expected bytes, at least 1")
        if type(self.allow_split) is not bool:
            raise UsageError(f"allow_split is {self.allow_split!r}; expected true or false")
        _ = self.written  # a rule checks its words when it is made

    def _said(self) -> list[str]:
        return [name for name in _OF_A_RULE if getattr(self, name)]

    @property
    def written(self) -> tuple[WrittenRule, ...]:
        """The rules, one where a format was asked for."""
        if self.to is None:
            return self.rules
        return (WrittenRule(**{name: getattr(self, name) for name in _OF_A_RULE}),)

    @property
    def main(self) -> FormatName:
        """The format that an output is called by: of several the first that is quantised."""
        asked = [rule.to for rule in self.written]
        return next((name for name in asked if FORMATS[name].quantised), asked[0])

    @property
    def in_force(self) -> WrittenRecipe:
        """The recipe that says the same, with its defaults."""
        return WrittenRecipe(rules=in_force(self.written), shard_size=self.shard_size, allow_split=self.allow_split)

    def as_json(self) -> dict[str, Any]:
        """Return what journals and reports say of it: the same of a rule as of the arguments that it stands for.

        `rules` stand there only where arguments could not say it; `to` is then the format that an output is called by.
        """
        first, *others = self.written
        plain = not others and not first.narrowed
        said = {part.name: getattr(self, part.name) for part in fields(self) if part.compare and part.name != "rules"}
        said |= {name: getattr(first, name) for name in _OF_A_RULE} if plain else {"to": self.main}
        if said["method"] is None:
            del said["method"]  # journals of plain options are as they were before there were methods
        rules = {} if plain else {"rules": [rule.as_json() for rule in self.rules]}
        return {**said, "ignore": list(said["ignore"]), **rules}


_OF_A_RULE = ("to", "scope", "ignore", "grid", "layout", "method")


def options_of(recipe: WrittenRecipe, **more: Any) -> Options:
    """Return what a recipe asks for.

    Args:
        recipe: the recipe.
        more: arguments that stand beside it; of these `shard_size` and `allow_split`, where the recipe has none.

    Raises:
        UsageError: another is given, or both say one thing.
    """
    given = [name for name in _OF_A_RULE if more.get(name)]
    given += [name for name in ("shard_size", "allow_split") if more.get(name) and getattr(recipe, name)]
    if given:
        raise UsageError(
            f"{listed(f'`{name}=`' for name in given)} beside `recipe=`, which says it already; choose one"
        )
    return Options(
        rules=recipe.rules,
        shard_size=recipe.shard_size or more.get("shard_size"),
        allow_split=recipe.allow_split or more.get("allow_split", False),
        budget=recipe.budget,
    )


def options_from(content: object) -> Options:
    """Return the options that a journal or report says.

    Raises:
        UsageError: they make no sense.
        TypeError: they are none.
    """
    if not isinstance(content, dict):
        raise TypeError(f"{content!r:.100} where options stand")
    said = dict(content)
    rules: tuple[WrittenRule, ...] = ()
    if "rules" in said:
        rules = recipe_from({"rules": said.pop("rules")}).rules
        said["to"] = None
    return Options(**{**said, "ignore": tuple(said.get("ignore", ()))}, rules=rules)


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
    method: Mapping[str, Any] | None = None
    """How better scales are searched than the format's own rule takes, and by what, as JSON has it; None: they are not.
    The values are the source's own."""
    origin: Mapping[str, Any] | None = None
    """Where such values come from, for the report alone: by another name they are no other values."""
    remarks: tuple[str, ...] = ()
    """What is worth saying of source and output, though it stops nothing."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

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
    if substituted and (method := options.in_force.method) != METHODS[0]:
        raise UsageError(
            f"`method=` {method} searches scales for a source's own values, which only `k2quant convert` writes: write "
            "bf16 here, then convert that"
        )
    weights, problems = group_tensors(source.tensors)
    if problems:
        raise problems[0]
    config.check_source(source.config, weights)
    recipe = make_recipe(options.written, weights)
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
    rounded = floats = False
    jobs = [job for shard in shards for job in shard.jobs]
    for job in jobs:
        if job.written is None:
            continue
        if job.weight.format is not None and job.weight.main.dtype in {"F16", "F32"} and not job.written.quantised:
            rounded |= job.target is not None
            floats |= job.target is None
        if job.written.quantised:
            quantised.setdefault(job.written.name, []).append(job.name)
        elif len(job.weight.shape) == 2 and job.weight.main.nbytes:
            kept.append(job.name)
    block = config.quantization_block({recipe.formats[name]: bases for name, bases in quantised.items()}, kept)
    return carried(source.config, jobs, block, substituted=substituted), rounded and not floats


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


def taken(plan: Plan) -> list[tuple[WrittenRule, int]]:
    """Return each rule that is in force with the number of weights that it takes, those that are copied too."""
    counts = Counter(id(plan.recipe.rule_of(job.weight)) for job in plan.jobs() if job.weight.format is not None)
    rules = zip(plan.options.in_force.rules, plan.recipe.rules, strict=True)
    return [(written, counts[id(rule)]) for written, rule in rules]


def describe(plan: Plan, marks: Mapping[str, str] | None = None) -> dict[str, dict[str, int]]:
    """Count the weights of each class by what is done with them: `copied`, `relabelled`, or `FORMAT -> FORMAT`.

    A weight is relabelled whose codes and scales stay as they are, under other names or with scales widened to float32.

    Args:
        plan: what will be written.
        marks: what else is done with some weights, by the names of their main tensors. It takes the place of `copied`,
            and else stands before the formats: `merged`, `merged, bf16 -> int4`.
    """
    table: dict[str, dict[str, int]] = {}
    for job in plan.jobs():
        done = "copied"
        if job.target is not None and job.weight.format is not None:
            way = f"{job.weight.format.name} -> {job.target.name}"
            done = "relabelled" if job.weight.format.relabels(job.target) else way
        if mark := (marks or {}).get(job.weight.main.name):
            done = mark if done == "copied" else f"{mark}, {done}"
        row = table.setdefault(names.tensor_class(job.weight.main.name), {})
        row[done] = row.get(done, 0) + 1
    return {kind: table[kind] for kind in names.TENSOR_CLASSES if kind in table}
