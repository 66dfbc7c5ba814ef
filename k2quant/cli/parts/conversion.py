"""What the commands that write a whole checkpoint have in common: their options, the dry run, the last line."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import click

from k2quant.cli.parts.options import Option, all_of, follow_links, soft_lock, words
from k2quant.formats.activations import KvCache
from k2quant.formats.format import Layout, Method, Scope
from k2quant.formats.known import FORMATS
from k2quant.kernels.codecs.grids import Grid

if TYPE_CHECKING:
    from k2quant.calib.solving.planning import SolvingPlan
    from k2quant.checking.engines import EngineCheck
    from k2quant.cli.parts.places import Place
    from k2quant.conversion.convert import Conversion
    from k2quant.conversion.places import Coming
    from k2quant.conversion.plan import Options, Plan
    from k2quant.conversion.searching.searched import Searched

_FORMAT = (
    click.option("--to", type=words(FORMATS), help="Format to write."),
    click.option(
        "--config",
        "recipe",
        type=click.Path(path_type=Path, allow_dash=True),
        metavar="RECIPE",
        help="In place of --to, --scope, --ignore, --grid and --layout: a YAML file of rules (docs/recipes.md), - for "
        "stdin, or another conversion's folder, to convert as that was.",
    ),
    click.option(
        "--scope",
        type=words(get_args(Scope)),
        help="Which weights get it: the routed experts (default for the 4-bit formats), every projection that engines "
        "run so (linear, default for fp8; of 4 bits without kv_b_proj), or every projection.",
    ),
    click.option(
        "--ignore", multiple=True, metavar="REGEX", help="Keep weights in whose name this is found out of scope."
    ),
    click.option(
        "--allow-split",
        is_flag=True,
        help="Write what engines fuse (experts of a layer, gate and up, q_a and kv_a) in several formats too.",
    ),
    click.option(
        "--grid",
        type=words(get_args(Grid)),
        help="INT4 rounding rule: amax/7 on -7..7 (moonshot, default) or amax/7.5 on -8..7.",
    ),
    click.option(
        "--layout",
        type=words(get_args(Layout)),
        help="Whose tensor names and config it is written with: of FP8 DeepSeek's (deepseek, default), of NVFP4 "
        "NVIDIA's (modelopt, default), of both llm-compressor's.",
    ),
    click.option(
        "--shard-size",
        metavar="SIZE",
        help="Tensor bytes of a shard, such as 5GB; at least 1MB (a larger weight gets its own); default: as before.",
    ),
    click.option("--workers", type=click.IntRange(1, 256), help="Threads; default: one for each core."),
)

_METHOD = (
    click.option(
        "--method",
        type=words(get_args(Method)),
        help="How scales of 4-bit formats are chosen: rounding to nearest (rtn, default), searched for the least "
        "squared error (mse, default from int4 to nvfp4 and mxfp4), or for the least error of outputs, by what a "
        "calibration saw (imatrix; awq, of int4: after a fold). gptq, of int4, chooses codes too, in a pass of --data "
        "through the model. A RECIPE says it in its rules.",
    ),
    click.option(
        "--stats",
        type=click.Path(path_type=Path),
        metavar="STATS",
        help="What k2quant calibrate wrote for SOURCE: for imatrix, and to judge each matrix by data held out.",
    ),
)

_BESIDE = (
    click.option(
        "--activation-scales",
        metavar="STATS|one",
        help="Scales of the inputs of NVFP4 weights, by the largest inputs in what k2quant calibrate wrote for SOURCE, "
        "or 1.0 (one); default: none, and engines leave inputs in BF16.",
    ),
    click.option(
        "--kv-cache",
        type=words(get_args(KvCache)),
        help="Have the config ask engines to keep keys and values in FP8; without scales, they take 1.0.",
    ),
    click.option(
        "--allow-rounding",
        is_flag=True,
        help="Where codes of FP4 cannot go over to NVFP4 as they are, round and count, in place of refusing: MXFP4 "
        "whose scales are too far apart, and a tensor scale that the other layout has no inverse of.",
    ),
)

_BEGIN = (
    click.option(
        "--dry-run", is_flag=True, help="Print what it would cost, write nothing; exit 1 if the disk is too small."
    ),
    click.option("--restart", is_flag=True, help="Throw away what an earlier run left in DESTINATION."),
    follow_links(),
    soft_lock(),
)

_SHA256 = click.option("--sha256", is_flag=True, help="Also note a sha256 of each file in the report.")

_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def format_options() -> Option[Any]:
    """Which weights get which format, in which shards, by how many threads."""
    return all_of(_FORMAT)


def method_options() -> Option[Any]:
    """How scales are chosen, and by what."""
    return all_of(_METHOD)


def beside_options() -> Option[Any]:
    """What a config says of inputs and of the KV cache, and whether codes may be rounded."""
    return all_of(_BESIDE)


def run_options() -> Option[Any]:
    """How a run begins and what it says."""
    return all_of((*_BEGIN, _SHA256, _JSON))


def begin_options() -> Option[Any]:
    """The same, of what notes no digests."""
    return all_of((*_BEGIN, _JSON))


def shard_bytes(text: str | None) -> int | None:
    """Read what `--shard-size` says; None where nothing is said.

    Raises:
        UsageError: it is no size, or so small that a checkpoint would fall into a file for each weight.
    """
    from k2quant.conversion.recipes.rules import LEAST_SHARD
    from k2quant.errors import UsageError
    from k2quant.ground.units import parse_size, size

    if text is None:
        return None
    found = parse_size(text)
    if found < LEAST_SHARD:
        raise UsageError(
            f"--shard-size: expected at least {size(LEAST_SHARD)}, found {size(found)}: each shard is a file with a "
            "header of its own, and a larger weight has its own shard in any case; 5GB is usual"
        )
    return found


_ASKED = (
    "to",
    "scope",
    "ignore",
    "grid",
    "shard_size",
    "layout",
    "allow_split",
    "method",
    "kv_cache",
    "allow_rounding",
)


def choice(options: dict[str, Any]) -> Options:
    """Return what the options of `format_options` ask for."""
    from k2quant.conversion.convert import chosen, source_of

    scales = source_of(options.get("activation_scales"))
    asked = {name: options[name] for name in _ASKED if name in options}
    return chosen(options["recipe"], activation_scales=scales, **asked)


def read_once(recipe: Path | None) -> Any:
    """Return what `--config` names; of `-`, which is stdin, and of a pipe the recipe itself: neither is read twice.

    Raises:
        UsageError: what stands there is no recipe.
    """
    if recipe is None or not (str(recipe) == "-" or recipe.is_fifo()):
        return recipe
    import sys

    from k2quant.conversion.recipes.rules import LIMIT, parse_recipe, read_recipe

    if recipe.is_fifo():
        return read_recipe(recipe)
    return parse_recipe(sys.stdin.buffer.read(LIMIT + 1), file="stdin")


def target(options: dict[str, Any]) -> str:
    """Return what a run makes, for the bar: a format, or by which recipe."""
    recipe = options["recipe"]
    if getattr(recipe, "budget", None):
        return f"{recipe.budget['bits']:.2f} bits"
    return str(options["to"]) if recipe is None else f"what {recipe.name if isinstance(recipe, Path) else '-'} says"


def announce(done: Conversion) -> None:
    """Say on stderr what the user may not expect: that work was there already, and what is worth saying of it."""
    from k2quant.cli.parts.screen import remark
    from k2quant.ground.units import counted

    if not done.already_done and not done.missing:  # who completes an output says what is worth saying of it
        _say(done.report["remarks"])
    if done.resumed:
        remark(f"resumed: {counted(done.resumed, 'shard')} finished before")


def tell_engines(done: Conversion, destination: Place) -> None:
    """Say in a line what the engines that an output is for have against it; whatever that is, the output stands.

    An output in a bucket is not read once more for that: `k2quant check` does it by its address.
    """
    from k2quant.checking.engines import check_written
    from k2quant.cli.parts.screen import remark
    from k2quant.errors import CheckpointError
    from k2quant.ground.engines import LABELS

    if done.already_done or not isinstance(destination, Path):
        return
    try:
        found = check_written(destination)
    except (CheckpointError, OSError):  # it was whole a moment ago: who reads it next will say what became of it
        return
    against: dict[str, list[EngineCheck]] = {}
    for each in found:
        if each.failures:
            against.setdefault(each.failures[0].rule, []).append(each)
    for rule, checks in against.items():
        engines = ", ".join(LABELS[each.engine] for each in checks)
        command = shlex.join(("k2quant", "check", "--engine", checks[0].engine, str(destination)))
        _say([f"{engines} would not run it: {rule}: {checks[0].failures[0].text}; see {command}"])
    fine = [LABELS[each.engine] for each in found if not each.failures]
    if fine:
        remark(f"checked for {', '.join(fine)}: nothing stands against it")


def _say(remarks: Iterable[str]) -> None:
    from k2quant.cli.parts.screen import warn

    for each in remarks:
        warn(f"note: {each}")


def summary(done: Conversion, destination: Place) -> dict[str, Any]:
    """Return what a run came to, as JSON has it."""
    report = {key: value for key, value in done.report.items() if key not in {"tensors", "source"}}
    return {"destination": str(destination), "already_done": done.already_done, **report}


def last_line(done: Conversion, destination: Place) -> str:
    """Return what a run came to, as people read it."""
    from k2quant.ground.units import duration, size

    report = done.report
    if done.already_done:
        return f"{destination}: already finished, nothing to do"
    ratio = report["bytes_written"] / max(report["bytes_read"], 1)
    rate = "" if report["resumed_shards"] else f", {size(report['bytes_read'] / report['seconds'])}/s"
    return (
        f"{destination}: {size(report['bytes_read'])} -> {size(report['bytes_written'])} ({ratio:.2f}x) "
        f"in {duration(report['seconds'])}{rate}"
    )


def quality(done: Conversion) -> str:
    """Say what rounding did to which classes of tensors, such as `SQNR: routed experts 20.2 dB, the rest exact`."""
    from k2quant.conversion.finishing.classes import figures_of
    from k2quant.ground.names import TENSOR_CLASSES, tensor_class
    from k2quant.kernels.codecs.figures import Figures

    sums = dict.fromkeys(TENSOR_CLASSES, Figures())
    exact = False
    for name, facts in done.report["tensors"].items():
        figures = figures_of(facts)
        sums[tensor_class(name)] += figures
        exact |= figures.exact
    rounded = [f"{kind} {figures.sqnr_db:.1f} dB" for kind, figures in sums.items() if not figures.exact]
    if not rounded:
        return "exact: every value is as it was"
    return "SQNR: " + ", ".join(rounded) + (", the rest exact" if exact else "")


def _search(plan: Plan, rounder: Searched | None) -> dict[str, Any]:
    """Return what a dry run says of a search, as JSON has it: what a report says of it, and of how many weights."""
    return {} if rounder is None or plan.method is None else {**plan.method, "weights": len(rounder)}


def _search_lines(method: dict[str, Any]) -> list[str]:
    from k2quant.ground.units import counted

    if not method:
        return []
    weights = counted(method["weights"], "weight")
    if "candidates" not in method:
        return [f"{'method':<16} {method['asked']}, at scales of {method['scales']}; {weights} solved"]
    what = f"{method['asked']}, {method['candidates']} scales a group; {weights} searched"
    lines = [f"{'method':<16} {what}"]
    return [*lines, f"{'stats':<16} {method['stats']}"] if "stats" in method else lines


def dry_run(
    plan: Plan,
    destination: Place,
    *,
    restart: bool,
    workers: int,
    as_json: bool,
    only: frozenset[str] | None = None,
    peak_memory: int | None = None,
    more: dict[str, Any] | None = None,
    marks: dict[str, str] | None = None,
    rounder: Searched | None = None,
    method: dict[str, Any] | None = None,
    cost: SolvingPlan | None = None,
    bandwidth: float | None = None,
    low_disk: bool = False,
) -> None:
    """Print what a plan would cost; exit 1 if the disk is too small.

    Args:
        plan: what would be written.
        destination: where.
        restart: whether what stands there would be thrown away.
        workers: threads.
        as_json: print JSON.
        only: files of the shards that one part writes: time and disk are this part's; None: all.
        peak_memory: bytes, where they are not the plan's own estimate.
        more: what else there is to say, by name; JSON alone has what is no plain value.
        marks: what else is done with some weights, as `describe` takes it.
        rounder: who searches scales, if anybody does.
        method: what is said of how codes are chosen, where that is no rounder's to say.
        cost: what it would take, where that is no mere conversion.
        bandwidth: bytes a second at which a source at an address comes, where that was named.
        low_disk: whether few shards of that may lie on the disk.
    """
    import json

    from k2quant.cli.parts import places
    from k2quant.cli.parts.terminal.tables import paragraph
    from k2quant.conversion.places import coming
    from k2quant.conversion.plan import describe, taken
    from k2quant.conversion.resume import standing_shards
    from k2quant.conversion.searching.inputs import inputs_of
    from k2quant.ground.units import counted, size

    searched = {job.weight.main.name: "searched" for job in plan.jobs() if rounder is not None and rounder.takes(job)}
    done, table = standing_shards(plan, destination, restart=restart), describe(plan, searched | (marks or {}))
    standing: dict[str, object] = {
        shard.file: {} for shard in plan.shards if shard.file in done or not (only is None or shard.file in only)
    }
    remote = coming(plan, standing, bandwidth=bandwidth, searched=cost is not None or rounder is not None)
    taking = (plan, destination, standing, workers, rounder, peak_memory, bandwidth)
    found = _cost(*taking, remote=remote, low_disk=low_disk) if cost is None else _solving_cost(plan, cost)
    _say(plan.remarks)
    method, inputs = method or _search(plan, rounder), inputs_of(plan)
    if as_json:
        work = {"shards": len(plan.shards), "shards_done": len(done), "work": table}
        work["remarks"] = list(plan.remarks)
        work["rules"] = [{**rule.as_json(), "weights": count} for rule, count in taken(plan)]
        work |= {"method": method} if method else {}
        work |= {"source": remote._asdict()} if remote is not None else {}
        work |= {"activation_scales": inputs} if inputs else {}
        click.echo(json.dumps({**found.facts, "fits": found.fits, **work, **(more or {})}))
    else:
        for number, (rule, count) in enumerate(taken(plan) if plan.options.rules else (), 1):
            line = f"{f'rule {number}':<16} {counted(count, 'weight')} to {rule.summary()}"
            click.echo(paragraph(line, hang=" " * 17))
        for kind, row in table.items():
            click.echo(f"{kind:<16} " + ", ".join(f"{count} {what}" for what, count in row.items()))
        for line in _search_lines(method):
            click.echo(line)
        if inputs is not None:
            click.echo(paragraph(f"{'inputs':<16} {_INPUTS[inputs['from']]}", hang=" " * 17))
        for name, value in (more or {}).items():
            if not isinstance(value, dict):
                click.echo(f"{name:<16} {value}")
        click.echo(f"{'read':<16} {size(plan.bytes_read)}")
        shards = counted(len(plan.shards), "shard")
        click.echo(f"{'written':<16} {size(plan.bytes_written)} in {shards}, {len(done)} of them done")
        remote_lines = {} if remote is None else places.lines(remote, asked=bandwidth is not None, low_disk=low_disk)
        for name, text in (remote_lines | found.lines).items():
            click.echo(paragraph(f"{name:<16} {text}", hang=" " * 17))
    if not found.fits:
        raise SystemExit(1)


_INPUTS = {
    "none": "no scales: weights only (--activation-scales)",
    "source": "scales as in the source",
    "one": "a scale of 1.0 beside each weight",
    "stats": "scales by the largest inputs that the calibration saw",
}
"""What a dry run says of scales of inputs, by where they come from."""


class _Cost(NamedTuple):
    """What a dry run says that a run would take."""

    facts: dict[str, Any]
    lines: dict[str, str]
    fits: bool


def _cost(
    plan: Plan,
    destination: Place,
    done: Mapping[str, object],
    workers: int,
    rounder: Searched | None,
    peak_memory: int | None,
    bandwidth: float | None,
    *,
    remote: Coming | None,
    low_disk: bool,
) -> _Cost:
    """Return what a conversion takes that runs no model."""
    from k2quant.conversion.estimate import estimate
    from k2quant.conversion.places import staged
    from k2quant.ground.units import duration, size

    cost = estimate(plan, destination, done=done, workers=workers, rounder=rounder, bandwidth=bandwidth)
    cost = cost._replace(peak_memory=peak_memory or cost.peak_memory)
    by, beside = " on the CPU", ""
    if remote is not None:
        if 2 * remote.seconds > cost.seconds:
            cost, by = cost._replace(seconds=max(cost.seconds, remote.seconds)), ", most of it for the network"
        lying = max(0, (remote.source_on_low_disk if low_disk else remote.source_least) - staged(destination))
        cost = cost._replace(disk_needed=cost.disk_needed + lying)
        beside = f", {size(lying)} of it for the source" if lying else ""
    lines = {
        "disk needed": size(cost.disk_needed) + beside + ("" if cost.fits else ", TOO SMALL"),
        "disk free": size(cost.disk_free),
        "peak memory": size(cost.peak_memory),
        "time": f"about {duration(cost.seconds)}{by}",
    }
    return _Cost(cost._asdict(), lines, cost.fits)


def _solving_cost(plan: Plan, cost: SolvingPlan) -> _Cost:
    read = {"bytes_read": plan.bytes_read, "bytes_written": plan.bytes_written}
    return _Cost({**read, **cost.as_json()}, cost.lines(), cost.fits)
