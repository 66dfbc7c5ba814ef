"""What `convert --method gptq` has beside other methods: its options, who may use them, the run and the dry run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from k2quant.cli.parts.data import check_data, data_options, said
from k2quant.cli.parts.options import Option, all_of, trust_remote_code, words

if TYPE_CHECKING:
    from k2quant.cli.parts.places import Place
    from k2quant.conversion.convert import Conversion
    from k2quant.conversion.plan import Options

SOLVED = "gptq"

_HOW = ("scales", "damping", "propagate")
_DATA = ("data", "samples", "length", "validation", "test", "split", "config_name", "reasoning", "memory")
_ALL = (*_HOW, *_DATA, "trust_remote_code")
"""Options that no other method has a use for."""

_NOT_SOLVED = ("activation_scales", "kv_cache", "allow_rounding")


def solving_options() -> Option[Any]:
    """How matrices are solved, and by which text."""
    from k2quant.calib.solving.settings import Scales

    options = (
        click.option(
            "--scales",
            type=words(get_args(Scales)),
            default="imatrix",
            show_default=True,
            help="Of gptq: who chooses the scales that codes are solved with.",
        ),
        click.option(
            "--damping",
            type=click.FloatRange(0, min_open=True),
            default=0.1,
            show_default=True,
            help="Of gptq: what is added to a Hessian's diagonal, in units of its mean.",
        ),
        click.option(
            "--propagate/--no-propagate",
            default=True,
            show_default=True,
            help="Of gptq: whether a layer sees what the quantised layers before it give.",
        ),
        data_options(required=False),
        trust_remote_code(),
    )

    return all_of(options)


def taken_out(given: dict[str, Any], choice: Options, *, asked: str | None) -> dict[str, Any] | None:
    """Take the options of this method out of a command's; None where another method was chosen.

    Args:
        given: the options by name; they are changed.
        choice: what they ask for.
        asked: the method that stands on the line. A budget may leave nothing to it: then no text is read.

    Raises:
        UsageError: the method has no use for one of them, or cannot do without.
    """
    from k2quant.cli.parts.screen import remark
    from k2quant.errors import UsageError
    from k2quant.formats.format import listed

    method = choice.in_force.method
    own = {name: given.pop(name) for name in _ALL}
    if method != SOLVED:
        if asked == SOLVED:
            remark(f"note: the budget leaves nothing for {SOLVED} to solve, and no text is read")
        elif stray := said(_ALL):
            names = listed(f"`{name}=`" for name in stray)
            raise UsageError(f"{names} with `method=` {method}, which {_without(stray)}")
        return None
    if stray := [name for name in _NOT_SOLVED if given.pop(name, None)]:
        names = listed(f"`{name}=`" for name in stray)
        raise UsageError(f"{names} with `method=` {SOLVED}, which writes formats that have no use for it")
    if given.pop("stats") is not None:
        raise UsageError("`stats=` has no meaning with `method=` gptq, which measures as it goes: name text, `data=`")
    if own["data"] is None:
        raise UsageError("`method=` gptq runs text through the model while it converts, and `data=` names none")
    return own


def _without(stray: list[str]) -> str:
    """Return why another method has no use for such options, and who has."""
    if frozenset(stray) <= frozenset(_HOW):
        return f"solves nothing: that is for {SOLVED}"
    return (
        f"runs no text through the model: {SOLVED} does; for imatrix and awq, `k2quant calibrate SOURCE STATS --data "
        "FILE` does it first"
    )


def check_solving(source: Place, given: dict[str, Any], own: dict[str, Any], *, tokenizer: bool) -> None:
    """Refuse what is missing or cannot be read before torch is loaded."""
    from k2quant.ground.extras import need
    from k2quant.ground.units import parse_size

    need("run", f"`convert --method {SOLVED}`")
    own["memory"] = parse_size(own["memory"])
    check_data(source, given | own, tokenizer=tokenizer)


def _folder(destination: Place) -> Path:
    """Return a destination that is a folder, below which a pass keeps what is solved.

    Raises:
        UsageError: it is none.
    """
    from k2quant.errors import UsageError

    if not isinstance(destination, Path):
        raise UsageError(f"{destination}: `--method {SOLVED}` writes to a folder; copy or push that one afterwards")
    return destination


def solve(source: Place, destination: Place, given: dict[str, Any], own: dict[str, Any]) -> Conversion:
    """Solve and convert, with a bar."""
    import gc

    gc.enable()  # the command line runs without; a pass makes garbage
    from k2quant.calib import solve  # only now: it loads torch and transformers
    from k2quant.cli.parts.screen import staged_tokens
    from k2quant.model.generation import silence

    silence()
    destination = _folder(destination)
    how = {name: value for name, value in given.items() if name != "method"}
    with staged_tokens("loading") as (show, stage):
        return solve(source, destination, progress=show, stage=stage, **how, **own)


def dry_run(
    source: Place,
    destination: Place,
    given: dict[str, Any],
    own: dict[str, Any],
    *,
    as_json: bool,
    more: dict[str, Any] | None = None,
    bandwidth: float | None = None,
) -> None:
    """Print what solving would take; exit 1 if the disk is too small."""
    from k2quant.calib.solving.planning import plan_solving
    from k2quant.calib.solving.writing.planned import plan_solved
    from k2quant.checkpoint.reader import open_checkpoint
    from k2quant.cli.parts import conversion
    from k2quant.cli.parts.screen import working
    from k2quant.conversion.resume import refuse_nested
    from k2quant.ground.pool import checked_workers

    refuse_nested(source, destination)
    destination = _folder(destination)
    with working(f"planning {source.name}"):
        planned = plan_solved(open_checkpoint(source, follow_links=given["follow_links"]), conversion.choice(given))
        rows = {name: own[name] for name in ("samples", "length", "memory", "scales", "propagate")}
        running = {name: given[name] for name in ("workers", "device")}
        # Where nothing is solved, as of INT4 that is copied, no pass is run: it costs what any conversion does.
        cost = plan_solving(planned.plan, destination, **running, **rows) if planned.jobs else None
    solved = {job.weight.main.name: "solved" for job in planned.jobs.values()}
    searched = {
        job.weight.main.name: "searched" for job in planned.plan.jobs() if job.name in frozenset(planned.abroad)
    }
    conversion.dry_run(
        planned.plan,
        destination,
        restart=given["restart"],
        workers=checked_workers(given["workers"]),
        as_json=as_json,
        more=more,
        marks=solved | searched,
        method={"asked": SOLVED, **{name: own[name] for name in _HOW}, "weights": len(planned.jobs)},
        cost=cost,
        bandwidth=bandwidth,
        low_disk=given["low_disk"],
    )
