"""Change the rules that carry the promises, one place at a time, and see whether a test notices.

A change that no test notices survives: it needs a test, or an entry in `scripts/mutation/equivalent.toml` that says why
it changes nothing. A change whose tests do not end counts as noticed. `scripts/mutation/README.md` has the scores.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mutation.equivalent import Key, reasons, stale
from mutation.making import Mutant, mutants
from mutation.running import changed, copied, tested, warm
from mutation.targets import TARGETS

_CHECKOUT = Path(__file__).resolve().parent.parent
_MEMORY = Path("/dev/shm")  # noqa: S108  a fresh folder of our own is made in it
_LIMIT = 3600  # seconds of the run that watches
_SLACK = 60.0  # seconds that the tests of a change may take beyond eight times what they took, wherever they hang


class Outcome(NamedTuple):
    """What became of a change."""

    mutant: Mutant
    state: str
    """`killed`, `timeout`, `survived`, or `unseen`: no test runs the line."""
    by: str
    """The test that noticed."""
    seconds: float


class Watched(NamedTuple):
    """What the tests of a module did when nothing was changed."""

    seconds: dict[str, float]
    lines: dict[str, list[int]]

    def reaching(self, mutant: Mutant, source: Sequence[str]) -> list[str]:
        """Return the tests that may meet a change, the fastest first."""
        lines: set[int] | None = set(range(mutant.first, mutant.line + 1))
        if mutant.everywhere:
            uses = (at for at, line in enumerate(source, 1) if any(name in line for name in mutant.names))
            lines = set(uses) - {mutant.line} if mutant.names else None
        met = [test for test, ran in self.lines.items() if lines is None or not lines.isdisjoint(ran)]
        return sorted(met, key=lambda test: self.seconds[test])


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog="Exits 3 when a change survives that is not listed."
    )
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(TARGETS)}; none: all of them")
    parser.add_argument("--sample", type=int, metavar="N", help="N changes of each module, the same in every run")
    parser.add_argument("--lines", metavar="FIRST-LAST", help="only changes of these lines")
    parser.add_argument("--tests", nargs="+", metavar="TEST", help="only these tests, not those of the table")
    parser.add_argument("--list", action="store_true", help="print the changes and run nothing")
    parser.add_argument("--results", type=Path, metavar="FILE", help="add a line of JSON for each change")
    given = parser.parse_args()
    if unknown := [name for name in given.modules if name not in TARGETS]:
        parser.error(f"no such module: {', '.join(unknown)}")
    if given.sample is not None and given.sample < 1:
        parser.error("--sample needs at least 1")
    return given


def tell(text: str) -> None:
    """Say how far it is."""
    print(text, file=sys.stderr, flush=True)


def chosen(made: list[Mutant], listed: Iterable[Key], given: argparse.Namespace) -> list[Mutant]:
    """Return the changes to try: those that are not listed, of a sample the first in an order that only they decide."""
    known = set(listed)
    left = [mutant for mutant in made if mutant.key not in known]
    if given.lines:
        first, _, last = given.lines.partition("-")
        left = [mutant for mutant in left if int(first) <= mutant.line <= int(last or first)]
    if given.sample is not None:
        left = sorted(sorted(left, key=lambda mutant: mutant.rank)[: given.sample], key=lambda mutant: mutant.line)
    return left


def watched(folder: Path, scratch: Path, module: str, tests: Sequence[str]) -> Watched:
    """Run the tests of a module unchanged, and see what each of them runs.

    Raises:
        SystemExit: one fails, and no change could be told from that.
    """
    from mutation.watching import Watch

    watch = Watch(folder / module)
    answer = tested(
        tests,
        watch,
        limit=_LIMIT,
        scratch=scratch,
        result=lambda: {"seconds": watch.seconds, "lines": watch.lines},
        write=True,
    )
    if answer.code != 0 or answer.content is None:
        sys.exit(f"{module}: its tests fail without any change\n{answer.output}")
    return Watched(**answer.content)


def tried(folder: Path, scratch: Path, mutant: Mutant, tests: Sequence[str], seconds: Mapping[str, float]) -> Outcome:
    """Run the tests that may meet a change, with the change."""
    from mutation.watching import ENDLESS, Select

    if not tests:
        return Outcome(mutant, "unseen", "", 0.0)
    select = Select(tests, seconds)
    limit = _SLACK + 8 * sum(seconds[test] for test in tests)
    files = sorted({test.partition("::")[0] for test in tests})
    with changed(folder / mutant.module, mutant.code):
        answer = tested(files, select, limit=limit, scratch=scratch, result=lambda: select.failed, write=False)
    state = {None: "timeout", ENDLESS: "timeout", 0: "survived", 5: "unseen"}.get(answer.code, "killed")
    return Outcome(mutant, state, answer.content or f"exit {answer.code}", answer.seconds)


def module_tried(work: Path, module: str, left: list[Mutant], answering: Sequence[str]) -> Iterable[Outcome]:
    """Try the changes of a module; tests that have noticed one are asked first about the next."""
    folder, scratch = work / "checkout", work / "scratch"
    source = (folder / module).read_text(encoding="utf-8").splitlines()
    before = watched(folder, scratch, module, answering)
    tell(f"{module}: {len(left)} changes, {len(before.seconds)} tests, {sum(before.seconds.values()):.0f} s")
    noticed: Counter[str] = Counter()
    for mutant in left:
        tests = sorted(before.reaching(mutant, source), key=lambda test: -noticed[test] / (0.1 + before.seconds[test]))
        outcome = tried(folder, scratch, mutant, tests, before.seconds)
        noticed[outcome.by] += outcome.state == "killed"
        yield outcome


def described(mutant: Mutant) -> str:
    """Return a line for people."""
    return f"{mutant.module}:{mutant.line}: {mutant.before}  ->  {mutant.after}"


def noted(path: Path | None, outcome: Outcome) -> None:
    """Add a change to the results."""
    if path is not None:
        content: dict[str, Any] = outcome._asdict() | {"mutant": outcome.mutant._replace(code="")._asdict()}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(content) + "\n")


def main() -> None:
    """Try the changes, print a line for each that survives and one for each module; leave with 3 if any survives."""
    given = arguments()
    listed, survivors, rows = reasons(), [], []
    with tempfile.TemporaryDirectory(prefix="k2quant-mutants-", dir=_MEMORY if _MEMORY.is_dir() else None) as name:
        work = Path(name).resolve()
        (work / "checkout").mkdir()
        copied(_CHECKOUT, work / "checkout")
        warm(work / "checkout")
        for module in given.modules or TARGETS:
            made = mutants(module, (work / "checkout" / module).read_text(encoding="utf-8"))
            if old := stale(listed, module, made):
                sys.exit("entries of equivalent.toml that are stale:\n" + "\n".join(" | ".join(key) for key in old))
            left = chosen(made, listed, given)
            if given.list:
                print(
                    "\n".join(f"{mutant.module}:{mutant.line}: {mutant.before}  ->  {mutant.after}" for mutant in left)
                )
                continue
            states: Counter[str] = Counter()
            for outcome in module_tried(work, module, left, given.tests or TARGETS[module]):
                states[outcome.state] += 1
                noted(given.results, outcome)
                if outcome.state != "killed":
                    print(f"{outcome.state:8} {described(outcome.mutant)}  [{outcome.by}]", flush=True)
                survivors += [outcome] if outcome.state in {"survived", "unseen"} else []
            dead = states["killed"] + states["timeout"]
            rows.append(f"{module}: {dead} of {len(left)} noticed ({dead / max(1, len(left)):.1%}), {dict(states)}")
            tell(rows[-1])
    print("\n".join(rows))
    sys.exit(3 if survivors else 0)


if __name__ == "__main__":
    main()
