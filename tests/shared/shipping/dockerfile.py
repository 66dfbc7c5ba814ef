"""The Dockerfile, read and carried out in a folder that stands for the image's root, without Docker.

Only what ours uses is known: FROM, ARG, LABEL, WORKDIR, COPY, RUN, ENV, USER, ENTRYPOINT and CMD. Both stages share the
folder, so that a virtual environment stays where it was made.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

_OF_IMAGE = ("src", "opt", "cache", "data", "tmp")
"""Folders of the image's root that its steps name."""


class Step(NamedTuple):
    """One instruction."""

    name: str
    text: str


class Image(NamedTuple):
    """What a build leaves."""

    root: Path
    environment: Mapping[str, str]
    folder: Path
    command: tuple[str, ...]
    """The entry point."""

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run its entry point, as `docker run IMAGE ARGUMENTS` does."""
        program = shutil.which(self.command[0], path=self.environment["PATH"])
        assert program, f"{self.command[0]} is not on PATH"
        command = [program, *self.command[1:], *map(str, arguments)]
        return subprocess.run(
            command, cwd=self.folder, env={**self.environment}, capture_output=True, text=True, check=False
        )


def read(path: Path) -> list[Step]:
    """Return the instructions of a Dockerfile, lines that go on put together."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [Step(*line.split(maxsplit=1)) for line in whole.splitlines() if line.strip()]


def ignored(context: Path, name: str) -> bool:
    """Tell whether `.dockerignore` keeps a path out of the context; the last pattern that fits counts."""
    kept = False
    for line in (context / ".dockerignore").read_text().split("\n"):
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        bare = pattern.removeprefix("!").removeprefix("**/")
        parts = name.split("/")
        places = parts if "**/" in pattern else parts[:1]
        if any(fnmatch.fnmatchcase(part, bare) for part in places):
            kept = not pattern.startswith("!")
    return kept


def copied(step: Step) -> tuple[list[str], str]:
    """Return what a COPY takes from the context, and where it goes; nothing of a COPY from another stage."""
    *sources, target = shlex.split(step.text)
    return ([], target) if sources[0].startswith("--from=") else (sources, target)


def build(context: Path, root: Path, arguments: Mapping[str, str], *, search: str | None = None) -> Image:
    """Carry out a Dockerfile's steps.

    Args:
        context: the folder with Dockerfile and `.dockerignore`.
        root: stands for `/`; made if need be.
        arguments: of the build, for those of ARG.
        search: the PATH of the base image, for `python`; None for this process's own.

    Raises:
        CalledProcessError: a RUN failed; its `stderr` says why.
    """
    for name in _OF_IMAGE:
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "cache").rmdir()  # a step makes it
    values = {"PATH": search or os.environ["PATH"], **_settings_of_pip()}
    folder, command = root, ("sh",)
    for name, text in read(context / "Dockerfile"):
        if name == "ARG":
            key, _, default = text.partition("=")
            values[key] = arguments.get(key, default)
        elif name == "WORKDIR":
            folder = Path(_placed(text, root))
            folder.mkdir(parents=True, exist_ok=True)
        elif name == "COPY":
            _copy(context, folder, Step(name, text), root)
        elif name == "RUN":
            subprocess.run(
                ["/bin/sh", "-c", _placed(text, root)],
                cwd=folder,
                env=values,
                check=True,
                capture_output=True,
                text=True,
            )
        elif name == "ENV":
            values |= dict(_pairs(_placed(text, root), values))
        elif name == "ENTRYPOINT":
            command = tuple(json.loads(text))
        else:
            assert name in {"FROM", "LABEL", "USER", "CMD"}, name
    return Image(root, values, folder, command)


def _settings_of_pip() -> dict[str, str]:
    """Return this machine's own settings of pip: where packages come from is nothing that an image says."""
    kept = ("PIP_", "SSL_", "HTTP", "http", "NO_PROXY", "no_proxy", "XDG_CONFIG")
    return {key: value for key, value in os.environ.items() if key.startswith(kept)}


def _placed(text: str, root: Path) -> str:
    """Move the absolute paths of a step below the root."""
    return re.sub(rf"(?<![\w.$}}/])/({'|'.join(_OF_IMAGE)})\b", rf"{root}/\1", text)


def _copy(context: Path, folder: Path, step: Step, root: Path) -> None:
    sources, target = copied(step)
    if not sources:
        assert Path(_placed(target, root)).exists(), f"COPY {step.text}: no stage made it"
    for name in sources:
        assert not ignored(context, name), f"COPY {step.text}: .dockerignore keeps it out"
        if (context / name).is_dir():
            skipped = shutil.ignore_patterns("__pycache__")
            shutil.copytree(context / name, folder / target, symlinks=True, ignore=skipped, dirs_exist_ok=True)
        else:
            shutil.copyfile(context / name, folder / target / name)


def _pairs(text: str, values: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for pair in shlex.split(text):
        key, _, value = pair.partition("=")
        yield key, re.sub(r"\$\{?(\w+)\}?", lambda hit: values.get(hit[1], ""), value)
