"""Build wheel and sdist, look inside, install the wheel alone in a fresh environment elsewhere, and convert with it."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT / "tests" / "shared"


def run(*command: str | Path, cwd: Path) -> None:
    """Run a command, and stop with its output when it fails."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}")


def check_contents(wheel: Path, sdist: Path) -> None:
    """Both hold the whole package as real files and nothing else below it, and the wheel has one top-level name."""
    sys.path.insert(0, str(SHARED))
    from package import differences  # one list for the tests and for this

    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    with tarfile.open(sdist) as archive:
        inside = [member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()]
    found = differences(ROOT, names, what=wheel.name) + differences(ROOT, inside, what=sdist.name)
    tops = {name.partition("/")[0] for name in names if ".dist-info" not in name}
    if found or tops != {"k2quant"}:
        sys.exit("\n".join([*found, f"top-level names of {wheel.name}: {', '.join(sorted(tops))}"]))


def main() -> None:
    """Do all of it in a temporary folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", cwd=ROOT)
        wheel, sdist = next(folder.glob("dist/*.whl")), next(folder.glob("dist/*.tar.gz"))
        check_contents(wheel, sdist)
        venv.create(folder / "env", with_pip=True)
        python = folder / "env" / "bin" / "python"
        constraints = ROOT / "constraints-dev.txt"
        run(python, "-m", "pip", "install", "--quiet", "--constraint", constraints, wheel, cwd=folder)
        run(folder / "env" / "bin" / "k2quant", "demo", folder / "demo", "--steps", "2", cwd=folder)
        run(python, "-m", "k2quant", "convert", "--to", "int4", folder / "demo" / "fp8", folder / "out", cwd=folder)
        print(f"{wheel.name} and {sdist.name}: whole; the wheel alone converts, trains and runs")


if __name__ == "__main__":
    main()
