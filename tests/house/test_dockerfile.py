"""The image: its files are there, its steps do what they say, and whoever runs it is not root. Without Docker."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from places import ROOT
from shipping.dockerfile import Step, build, copied, ignored, read
from shipping.package import differences, packaged

STUB_PYTHON = """\
#!/bin/sh
test "$1 $2" = "-m venv" || exit 1
mkdir -p "$3/bin"
printf '#!/bin/sh\\nprintf "%%s\\\\n" "$@" > "{log}"\\n' > "$3/bin/pip"
printf '#!/bin/sh\\nprintf "%%s\\\\n" "$PWD" "$NUMBA_CACHE_DIR" "$HOME" "$@"\\n' > "$3/bin/k2quant"
chmod +x "$3/bin/pip" "$3/bin/k2quant"
"""
"""A python that makes environments whose pip notes what it is to install, and whose k2quant says where it runs."""


def texts(name: str) -> list[str]:
    """Return what the Dockerfile says after each instruction of a name."""
    return [step.text for step in read(ROOT / "Dockerfile") if step.name == name]


@pytest.fixture
def python(tmp_path: Path) -> str:
    """A PATH with the stub before the system's own programs."""
    home = tmp_path / "bin"
    home.mkdir()
    (home / "python").write_text(STUB_PYTHON.format(log=tmp_path / "installed"))
    (home / "python").chmod(0o755)
    return f"{home}:/usr/bin:/bin"


def test_what_is_copied_makes_the_whole_package(tmp_path: Path) -> None:
    """Every source of COPY is there and in the context; a build of them alone has each module, table and text."""
    sources = [name for text in texts("COPY") for name in copied(Step("COPY", text))[0]]
    assert sources
    for name in sources:
        assert not ignored(ROOT, name), name
        if (ROOT / name).is_dir():
            skipped = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=skipped)
        else:
            shutil.copyfile(ROOT / name, tmp_path / name)
    assert differences(ROOT, packaged(tmp_path), what="the image") == []


@pytest.mark.parametrize("name", [".git", ".venv", "demo-run", "tests", "model.safetensors", "eval/__pycache__/a.pyc"])
def test_the_context_holds_nothing_else(name: str) -> None:
    """What no step copies is never sent: environments, history, models, caches."""
    assert ignored(ROOT, name)


@pytest.mark.parametrize(
    ("extras", "installed"), [("", "."), ("run", ".[run]"), ("run,report", ".[run,report]"), (None, ".[run]")]
)
def test_the_steps_install_what_is_asked_for(extras: str | None, installed: str, python: str, tmp_path: Path) -> None:
    """Base alone, the extras named, or those of the file; with the versions that tests run with, from a named index."""
    arguments = {"TORCH_INDEX": "file:///torch"} | ({} if extras is None else {"EXTRAS": extras})
    build(ROOT, tmp_path / "root", arguments, search=python)
    said = (tmp_path / "installed").read_text().split()
    assert said[0] == "install"
    assert said[-1] == installed
    assert said[said.index("--constraint") + 1] == "constraints-dev.txt"
    assert (tmp_path / "root" / "src" / "constraints-dev.txt").exists()
    assert said[said.index("--extra-index-url") + 1] == "file:///torch"


def test_the_image_is_the_command(python: str, tmp_path: Path) -> None:
    """Arguments go to `k2quant`, which runs where volumes are mounted, with a cache and a home that all may write."""
    image = build(ROOT, tmp_path / "root", {}, search=python)
    done = image.run("inspect", "MODEL")
    data, cache, home, *arguments = done.stdout.split()
    root = tmp_path / "root"
    assert [Path(place).relative_to(root).as_posix() for place in (data, cache, home)] == ["data", "cache/numba", "tmp"]
    assert arguments == ["inspect", "MODEL"]
    assert (root / "cache").stat().st_mode & 0o7777 == 0o1777
    assert [json.loads(text) for text in texts("CMD")] == [["--help"]]


def test_who_runs_it_is_not_root() -> None:
    """The last stage ends as a user with a number, so that rules against root can see it; nothing runs after it."""
    names = [step.name for step in read(ROOT / "Dockerfile")]
    (user,) = texts("USER")
    number, _, group = user.partition(":")
    assert int(number) >= 1000
    assert int(group) >= 1000
    assert "RUN" not in names[names.index("USER") :]
    assert names.index("USER") > max(place for place, name in enumerate(names) if name == "FROM")


def test_bases_are_small_and_of_a_python_that_is_taken() -> None:
    """Two stages from python:X-slim, and pyproject.toml takes X: what built the package is not in the image."""
    assert [text.split(" AS ")[0] for text in texts("FROM")] == ["python:${PYTHON}-slim"] * 2
    version = next(text for text in texts("ARG") if text.startswith("PYTHON=")).removeprefix("PYTHON=")
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    assert tuple(map(int, version.split("."))) >= tuple(map(int, asked.split(".")))


def test_hadolint_finds_nothing() -> None:
    """The linter of Dockerfiles has no complaint."""
    linter = Path(sys.executable).with_name("hadolint")
    if not linter.exists():
        pytest.skip("hadolint is not installed here")
    done = subprocess.run([linter, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (("/opt/k2quant/bin/pip install", "/opt/k2quant/bin/pip2 install"), subprocess.CalledProcessError),
        (("COPY qat qat", "COPY qatt qatt"), (FileNotFoundError, AssertionError)),
        (('ENTRYPOINT ["k2quant"]', "STOPSIGNAL 9"), AssertionError),
    ],
)
def test_steps_that_fail_are_seen(change: tuple[str, str], error: type[Exception], python: str, tmp_path: Path) -> None:
    """A RUN that fails, a COPY of nothing and an instruction that is not known end the build here as in Docker."""
    text = (ROOT / "Dockerfile").read_text()
    assert text.count(change[0]) == 1
    for name in ("pyproject.toml", "README.md", "LICENSE", "constraints-dev.txt", ".dockerignore"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    for name in ("calib", "eval", "exports", "kernels", "qat", "k2quant"):
        (tmp_path / name).mkdir()
    (tmp_path / "Dockerfile").write_text(text.replace(*change))
    with pytest.raises(error):
        build(tmp_path, tmp_path / "root", {}, search=python)
