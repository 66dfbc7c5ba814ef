"""Build wheel and sdist, look inside, and do with the wheel alone, elsewhere, what base and each extra promise.

One environment grows: base first; then each refusal of a command is obeyed as it stands, so that the extra which it
names is what was missing. The Dockerfile's steps are carried out too, for base, in a folder that stands for the image.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT / "tests" / "shared"
CONSTRAINTS = ROOT / "constraints-dev.txt"

JOB = {
    "model": "nano",
    "output": "trained",
    "data": {"path": "tasks/train.jsonl", "length": 64, "held_out": 2},
    "training": {"steps": 1, "batch": 2},
    "quantize": {"to": "int4"},
    "saving": {"tensorboard": True},
}
"""A training of one step that TensorBoard hears of."""


def run(*command: object, cwd: Path) -> str:
    """Run a command, return what it says, and stop with its output when it fails."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}")
    return done.stdout + done.stderr


def check_contents(wheel: Path, sdist: Path) -> None:
    """Both hold the whole package as real files and nothing else below it, and the wheel has one top-level name."""
    from shipping.package import differences  # one list for the tests and for this

    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    with tarfile.open(sdist) as archive:
        inside = [member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()]
    found = differences(ROOT, names, what=wheel.name) + differences(ROOT, inside, what=sdist.name)
    tops = {name.partition("/")[0] for name in names if ".dist-info" not in name}
    if found or tops != {"k2quant"}:
        sys.exit("\n".join([*found, f"top-level names of {wheel.name}: {', '.join(sorted(tops))}"]))


class Environment:
    """A virtual environment with the wheel and what it requires, and a folder to work in."""

    def __init__(self, home: Path, wheel: Path) -> None:
        self.folder = home / "work"
        self.folder.mkdir()
        venv.create(home / "env", with_pip=True)
        self._bin = home / "env" / "bin"
        self._install(str(wheel))

    def does(self, command: str, *, without: tuple[str, ...] = ()) -> str:
        """Run a command of k2quant, as if some packages were not there; it must succeed."""
        code = f"import sys; sys.modules.update(dict.fromkeys({without!r})); from k2quant.cli import main; main()"
        return run(self._bin / "python", "-c", code, *shlex.split(command), cwd=self.folder)

    def asks_for(self, extra: str, command: str) -> None:
        """Run a command that must name the extra it lacks, and do as it says."""
        called = [str(self._bin / "k2quant"), *shlex.split(command)]
        done = subprocess.run(called, cwd=self.folder, capture_output=True, text=True, check=False)
        remedy = re.search(r"; pip install '(k2quant\[\w+\])'", done.stderr)
        if done.returncode != 1 or remedy is None or remedy[1] != f"k2quant[{extra}]" or "Traceback" in done.stderr:
            sys.exit(f"k2quant {command} did not name the extra {extra}, exit {done.returncode}: {done.stderr}")
        self._install(remedy[1])

    def _install(self, what: str) -> None:
        pip = (self._bin / "python", "-m", "pip", "install", "--quiet", "--no-compile", "--constraint", CONSTRAINTS)
        run(*pip, what, cwd=self.folder)


def check_base(env: Environment) -> None:
    """Base converts, merges nothing, checks what it made, plans a gate, and ends its demo where it says."""
    said = env.does("demo demo")
    if "ends after the conversions" not in said or "nano-K2: training" in said:
        sys.exit(f"the demo of base does not say where it ends: {said}")
    env.does("convert --to int4 demo/fp8 int4")
    env.does("verify demo/fp8 int4")
    env.does("inspect int4")
    env.does("eval plan --power 0.5 --flips 1% --margin 5pp")


def check_extras(env: Environment) -> None:
    """Each extra is installed as a command asks for it, and then does what its commands do."""
    env.asks_for("report", "report int4")
    env.does("report int4")
    env.asks_for("run", "nano nano --steps 2 --tasks tasks")
    drawing = ("matplotlib", "lm_eval", "datasets", "tensorboard")  # `run` has none of them
    env.does("nano nano --steps 2 --tasks tasks", without=drawing)
    env.does("generate nano --prompt A0478+3= --max-new-tokens 2", without=drawing)
    env.does("eval fidelity nano nano --tokens 64 --context 32", without=drawing)
    env.asks_for("eval", "eval run nano --include tasks --tasks nano_choice --limit 2 -o answers")
    env.does("eval run nano --include tasks --tasks nano_choice --limit 2 -o answers")
    (env.folder / "job.yaml").write_text(json.dumps(JOB))
    env.asks_for("qat", "qat train job.yaml")
    env.does("qat train job.yaml")
    env.does("qat export trained exported")
    env.does("verify exported exported")


def check_image(home: Path) -> None:
    """The Dockerfile's steps make an environment of base alone whose entry point converts."""
    from shipping.dockerfile import build

    (home / "index").mkdir()
    arguments = {"EXTRAS": "", "TORCH_INDEX": (home / "index").as_uri()}
    search = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    try:
        image = build(ROOT, home / "image", arguments, search=search)
    except subprocess.CalledProcessError as error:
        sys.exit(f"a step of the Dockerfile fails: {error.cmd[-1]}\n{error.stdout}\n{error.stderr}")
    for command in ("demo demo", "inspect demo/fp8-int4"):
        done = image.run(*command.split())
        if done.returncode:
            sys.exit(f"in the image, k2quant {command}\n{done.stdout}\n{done.stderr}")


def main() -> None:
    """Do all of it in a temporary folder."""
    sys.path.insert(0, str(SHARED))
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", cwd=ROOT)
        wheel, sdist = next(folder.glob("dist/*.whl")), next(folder.glob("dist/*.tar.gz"))
        check_contents(wheel, sdist)
        env = Environment(folder, wheel)
        for part in (check_base, check_extras):
            part(env)
            print(f"{part.__name__}: {time.monotonic() - begun:.0f} s", flush=True)
        check_image(folder)
    print(
        f"{wheel.name} and {sdist.name}: whole; the wheel alone converts, and draws, runs, asks and trains with its "
        f"extras; the image's steps work; {time.monotonic() - begun:.0f} s"
    )


if __name__ == "__main__":
    main()
