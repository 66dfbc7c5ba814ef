"""Run the same commands with the packages of two checkouts, and compare all that they write and say, byte for byte.

For changes that users must not notice. `scripts/compare/` has the commands, and in `normalising.py` what may differ.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from compare import conversions, evaluations, trainings, words
from compare.commands import with_needs
from compare.comparing import Outcome, compare
from compare.running import Side, held, reusable, run

_SHOWN = 10  # differences of a group

GROUPS = (conversions.DEMO, *trainings.GROUPS, *evaluations.GROUPS, *conversions.GROUPS, *words.GROUPS)
"""What takes longest comes first, for what can run beside it."""


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], epilog="Exits 3 when something differs.")
    parser.add_argument("old", type=Path, metavar="OLD", help="checkout whose output is right")
    parser.add_argument("new", type=Path, metavar="NEW", help="checkout whose output must be equal")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep all output in DIR/old and DIR/new")
    parser.add_argument("--reuse-old", action="store_true", help="take what an earlier run left in DIR/old")
    parser.add_argument("--keep", action="store_true", help="keep all output also without --work, and say where")
    names = [group.name for group in GROUPS]
    parser.add_argument("--only", choices=names, help="run and compare only this group and what it needs")
    parser.add_argument("--all", action="store_true", help=f"show all differences, not {_SHOWN} of each group")
    parser.add_argument("--jobs", type=int, metavar="N", default=2, help="commands at a time (default: 2)")
    given = parser.parse_args()
    if given.reuse_old and given.work is None:
        parser.error("--reuse-old needs --work")
    if given.jobs < 1:
        parser.error("--jobs needs at least 1")
    return given


def tell(text: str) -> None:
    """Say how far it is."""
    print(text, file=sys.stderr, flush=True)


def compared(work: Path, given: argparse.Namespace) -> list[Outcome]:
    """Run in a folder and compare."""
    old, new = (Side(name, path.resolve(), work / name) for name, path in (("old", given.old), ("new", given.new)))
    groups = with_needs(GROUPS, given.only) if given.only else GROUPS
    if given.reuse_old and (why := reusable(old, groups)):
        sys.exit(f"{old.home} cannot be used again: {why}; leave --reuse-old out")
    run((new,) if given.reuse_old else (old, new), groups, jobs=given.jobs, tell=tell)
    for side in (old, new):
        record = side.record()
        print(f"{side.name}: {side.checkout}, commit {record['commit']}, version {record['version']}")
    return [compare(old, new, group.name) for group in groups]


def main() -> None:
    """Compare, print a line for each group, and leave with 3 when something differs."""
    given = arguments()
    if given.work is not None or given.keep:
        work = (given.work or Path(tempfile.mkdtemp(prefix="compare-checkouts-"))).resolve()
        with held(work):
            outcomes = compared(work, given)
        tell(f"all output is in {work}")
    else:
        with tempfile.TemporaryDirectory(prefix="compare-checkouts-") as name:
            outcomes = compared(Path(name).resolve(), given)
    for outcome in outcomes:
        print(outcome.text(None if given.all else _SHOWN))
    differ = sum(len(outcome.differences) for outcome in outcomes)
    print(f"{differ} things differ" if differ else "equal")
    sys.exit(3 if differ else 0)


if __name__ == "__main__":
    main()
