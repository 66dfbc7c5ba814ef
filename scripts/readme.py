"""Run the commands of the README on what `make demo` left, and paste what they print below them.

Usage: python scripts/readme.py FOLDER [PAGE ...]

FOLDER has a `demo-run` in it; without one the demo runs first, three minutes. Pages are README.md and
docs/first-hour.md unless some are named. A block of shell with a block of `text` right below it has that text replaced;
`<!-- not run: why -->` in the line above keeps a block from running, `<!-- 12 lines -->` above an output cuts it there.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT / "tests" / "shared"
PAGES = ("README.md", "docs/first-hour.md")
_PROGRESS = re.compile(r"^k2quant: .*(?:\d+%|so far).*\n?", re.MULTILINE)
"""A line that a slow machine sees while it waits."""


def paste(page: Path, folder: Path) -> None:
    """Run the blocks of a page in its order, in a folder that is staged, and put what they print into the page."""
    from pages import run_step, steps  # what the tests run too

    lines = page.read_text().splitlines()
    moved = 0
    for step in steps(page):
        done = run_step(step, folder)
        print(f"{step.block.place}: exit {done.returncode}", flush=True)
        if step.output is None:
            continue
        printed = [line.rstrip() for line in _PROGRESS.sub("", done.stdout).replace(f"{folder}/", "").splitlines()]
        length = re.match(r"(\d+) lines", step.output.note)
        if length and len(printed) > int(length[1]):
            printed = [*printed[: int(length[1])], "..."]
        first, last = step.output.line + moved, step.output.end - 1 + moved
        lines[first:last] = printed
        moved += len(printed) - (last - first)
    page.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Do it in the folder that the command line names."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.path.insert(0, str(SHARED))
    from pages import stage

    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "demo-run").is_dir():
        subprocess.run([sys.executable, "-m", "k2quant", "demo", "demo-run"], cwd=folder, check=True)
    for name in sys.argv[2:] or PAGES:
        with tempfile.TemporaryDirectory(dir=folder) as fresh:
            stage(Path(fresh))
            shutil.copytree(folder / "demo-run", Path(fresh, "demo-run"))
            paste(ROOT / name, Path(fresh))


if __name__ == "__main__":
    main()
