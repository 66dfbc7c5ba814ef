"""What a conversion will write, computed from headers alone.

A plan is pure data. `convert` obeys it, `--dry-run` prints it, and its shards are independent tasks: a cluster can give
each to another machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_args

from k2quant.checkpoint.beside import PASSED_OVER, Beside, describes_quantization, other_files
from k2quant.checkpoint.files.strict_json import without_mark
from k2quant.checkpoint.panels import PANEL_WEIGHTS, PIECE_BYTES, ROW_STEP
from k2quant.checkpoint.reader import CONFIG, INDEX, Checkpoint
from k2quant.checkpoint.supply.choosing import memory as supply_memory
from k2quant.checkpoint.weights import StoredWeight, group_tensors
from k2quant.conversion.metadata import config, relatives
from k2quant.conversion.metadata.carrying import Carried, carried
from k2quant.conversion.metadata.promises import broken_promises, inventory
from k2quant.conversion.placing import Job, ShardPlan, as_json, index_of, place
from k2quant.conversion.recipes.recipe import Recipe, make_recipe
from k2quant.conversion.recipes.rules import METHODS, WrittenRecipe, WrittenRule, in_force, recipe_from
from k2quant.errors import CheckpointError, UnsupportedFormat, UsageError
from k2quant.formats.activations import ActivationScales, KvCache
from k2quant.formats.format import Format, Layout, Method, Scope, listed
from k2quant.formats.known import FORMATS, FormatName
from k2quant.ground import names
from k2quant.ground.saying.showing import brief
from k2quant.ground.units import counted, one_of
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
    """None: rtn, but where `Format.searched_from` says that scales are searched."""
    activation_scales: ActivationScales | None = None
    """Where scales of layers' inputs come from; None: the output has none."""
    kv_cache: KvCache | None = None
    """In what engines keep keys and values; None: as the source's config says it, if it does."""
    allow_rounding: bool = False
    """Whether codes that cannot be carried over as they are may be rounded."""
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
        for name in ("allow_split", "allow_rounding"):
            if type(getattr(self, name)) is not bool:
                raise UsageError(f"{name} is {getattr(self, name)!r}; expected true or false")
        formats = [rule.to for rule in self.written]  # a rule checks its words when it is made
        if self.activation_scales is not None:
            one_of("source of activation scales", self.activation_scales, get_args(ActivationScales))
            _check_any(formats, "takes_inputs", "`activation_scales=`", "scales of inputs stand only beside")
        if self.kv_cache is not None:
            one_of("format of the KV cache", self.kv_cache, get_args(KvCache))
            _check_any(formats, "quantised", "`kv_cache=`", "engines read it in the config of")
        if self.allow_rounding:
            _check_any(formats, "carried_from", "`allow_rounding=`", "codes of FP4 go over unrounded only to")

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

    def adapted(self, target: Format) -> Format:
        """Return a format with what was asked for beside scope, grid and layout."""
        if self.activation_scales is not None and target.takes_inputs:
            target = target.with_inputs(None)
        return target.rounding_allowed() if self.allow_rounding else target

    def as_json(self) -> dict[str, Any]:
        """Return what journals and reports say of it: the same of a rule as of the arguments that it stands for.

        `rules` stand there only where arguments could not say it; `to` is then the format that an output is called by.
        """
        first, *others = self.written
        plain = not others and not first.narrowed
        said = {part.name: getattr(self, part.name) for part in fields(self) if part.compare and part.name != "rules"}
        said |= {name: getattr(first, name) for name in _OF_A_RULE} if plain else {"to": self.main}
        for name in _LATER:
            if not said[name]:
                del said[name]  # journals of plain options are as they were before there were any
        rules = {} if plain else {"rules": [rule.as_json() for rule in self.rules]}
        return {**said, "ignore": list(said["ignore"]), **rules}


_OF_A_RULE = ("to", "scope", "ignore", "grid", "layout", "method")
_BESIDE = ("shard_size", "allow_split")
"""What a recipe may say, or stands beside it."""
_LATER = ("method", "activation_scales", "kv_cache", "allow_rounding")


def _check_any(formats: list[FormatName], what: str, name: str, why: str) -> None:
    """Refuse an option for which none of the formats that are written has a use.

    Raises:
        UsageError: none has.
    """
    if not any(getattr(FORMATS[each], what) for each in formats):
        owners = listed(each.upper() for each, kind in FORMATS.items() if getattr(kind, what))
        raise UsageError(f"{name} has no meaning with {listed(dict.fromkeys(formats))}: {why} {owners}")


def options_of(recipe: WrittenRecipe, **more: Any) -> Options:
    """Return what a recipe asks for.

    Args:
        recipe: the recipe.
        more: arguments that stand beside it; of these `shard_size` and `allow_split`, where the recipe has none, and
            those of which no recipe speaks.

    Raises:
        UsageError: another is given, or both say one thing.
    """
    given = [name for name in _OF_A_RULE if more.get(name)]
    given += [name for name in _BESIDE if more.get(name) and getattr(recipe, name)]
    if given:
        raise UsageError(
            f"{listed(f'`{name}=`' for name in given)} beside `recipe=`, which says it already; choose one"
        )
    return Options(
        rules=recipe.rules,
        shard_size=recipe.shard_size or more.get("shard_size"),
        allow_split=recipe.allow_split or more.get("allow_split", False),
        budget=recipe.budget,
        **{name: value for name, value in more.items() if name not in {*_OF_A_RULE, *_BESIDE}},
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
    inputs: Mapping[str, Any] | None = None
    """Where the scales of layers' inputs come from, as JSON has it; None: there are none, or the source's own."""
    companions: Mapping[str, bytes] = field(default_factory=dict)
    """Files beside config.json that say the same in another tool's words, by name, each whole."""
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
        return sum(shard.size for shard in self.shards) + sum(map(len, self.last.values())) + copies

    @property
    def last(self) -> dict[str, bytes]:
        """The small files that are written when all shards stand, by name, in their order: config.json comes last."""
        return {INDEX: self.index, **self.companions, **({} if self.config is None else {CONFIG: self.config})}

    def jobs(self) -> Iterator[Job]:
        """Yield every job, shard by shard."""
        return (job for shard in self.shards for job in shard.jobs)

    def peak_memory(self, workers: int) -> int:
        """Return an upper estimate of the resident memory in bytes; it does not grow with the model."""
        widest = max((job.weight.shape[-1] for job in self.jobs() if job.target and job.weight.shape), default=0)
        panel = max(PANEL_WEIGHTS, ROW_STEP * widest)
        headers = 2_000 * len(self.source.tensors)
        ahead = 0 if self.source.supply is None else supply_memory(workers)
        return _BASE_MEMORY + workers * max(_BYTES_PER_WEIGHT * panel, PIECE_BYTES) + headers + ahead


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
    recipe = make_recipe(options.written, weights, options.adapted)
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
        found, rounded = _carried(source, shards, recipe, options, substituted=substituted)
        config_json = _config(source, found, rounded=rounded)
        beside = other_files(source)
    except OSError as error:
        message = "cannot be read"
        raise CheckpointError(message, file=error.filename or source.place, found=error.strerror) from error
    if found.left:
        shards = place((w for w in weights if w.main.name not in found.left), recipe, options.shard_size)
    companions = _companions(found.block)
    remarks = (
        *_remarks(source, beside, companions),
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
        companions=companions,
    )


def _carried(
    source: Checkpoint, shards: tuple[ShardPlan, ...], recipe: Recipe, options: Options, *, substituted: bool
) -> tuple[Carried, bool]:
    """Return what of the source goes along with its weights, and whether floats of other dtypes become BF16."""
    if source.config is None and recipe.quantises:
        raise CheckpointError(
            "is not there, and a quantised checkpoint cannot be loaded without it",
            file=source.named(CONFIG),
            remedy="take it from the model's release",
        )
    quantised: dict[str, list[Job]] = {}
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
            quantised.setdefault(job.written.name, []).append(job)
        elif len(job.weight.shape) == 2 and job.weight.main.nbytes:
            kept.append(job.name)
    written = {_described(recipe, name, found): [job.name for job in found] for name, found in quantised.items()}
    block = config.quantization_block(written, kept)
    if options.kv_cache is None:
        return carried(source.config, jobs, block, substituted=substituted), rounded and not floats
    found = carried(source.config, jobs, _with_cache(block, written), substituted=substituted)
    return found._replace(block=_with_cache(found.block, written)), rounded and not floats  # not as the source has it


def _companions(block: Mapping[str, Any] | None) -> dict[str, bytes]:
    """Return the files that say what an output's block says, where its tool has some."""
    method = None if block is None else block.get("quant_method")
    kind = next((kind for kind in FORMATS.values() if kind.method == method), None)
    return {} if block is None or kind is None else kind.companions(block)


def _described(recipe: Recipe, name: str, jobs: list[Job]) -> Format:
    """Return the format of which a config speaks where some weights are written in one of this name.

    Raises:
        UnsupportedFormat: some have a scale of their inputs and others not, and no config can say so.
    """
    scaled = {job.written.scales_inputs: job for job in jobs if job.written is not None}
    if len(scaled) > 1:
        raise UnsupportedFormat(
            "has no scale of its input, as others have",
            tensor=scaled[False].weight.main.name,
            file=scaled[False].weight.main.file,
            found=f"one beside {scaled[True].name}",
            remedy="give all of them one with `activation_scales=`",
        )
    asked, own = recipe.formats[name], scaled.get(True)
    return own.written if own is not None and own.written is not None and not asked.scales_inputs else asked


def _with_cache(block: dict[str, Any] | None, written: Mapping[Format, list[str]]) -> dict[str, Any]:
    """Return a quantization block that asks for an FP8 cache of keys and values, without scales.

    vLLM takes 1.0 where the checkpoint has none, with a warning (vllm/model_executor/layers/quantization/kv_cache.py,
    `BaseKVCacheMethod`); a `kv_cache_scheme` alone makes it keep them in FP8 (`attention.py` for compressed-tensors,
    `get_kv_cache_quant_algo_string` for ModelOpt).

    Raises:
        UsageError: nothing is quantised, or the config has no place for it.
    """
    scheme = next((found for each in written if (found := each.cache_scheme()) is not None), None)
    if block is None or scheme is None:
        what = listed(each.label for each in written) or "nothing that is quantised"
        raise UsageError(
            f"`kv_cache=` has no place in the config of {what}: engines read it in configs of ModelOpt and of "
            "compressed-tensors alone; write such a layout, or ask the engine for it when it is started"
        )
    return block | {"kv_cache_scheme": scheme}


def _config(source: Checkpoint, found: Carried, *, rounded: bool) -> bytes | None:
    """Return the output's config.json, whole; None where the source has none."""
    if source.config is None:
        return None
    if found.block is None and not rounded and not config.quantization_blocks(source.config):
        # Whatever else stands there stays as it is; but engines read no file that begins with a byte-order mark.
        return without_mark(source.config_bytes(), file=source.named(CONFIG))
    return as_json(config.edited(source.config, found.block, rounded_to_bf16=rounded))


def _remarks(source: Checkpoint, beside: Beside, companions: Mapping[str, bytes]) -> Iterator[str]:
    """Say what of the source's files is not in the output."""
    weights = [name for name in beside.left_out if not describes_quantization(name)]
    if weights:
        yield f"left out, for the index does not name them: {listed(map(relatives.shown, weights))}"
    if described := [name for name in beside.left_out if name not in weights and name not in companions]:
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
