"""The wheel holds the whole package, nested folders and tables included, and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from places import ROOT
from shipping.package import differences, package_files, packaged

BESIDE = ("pyproject.toml", "README.md", "LICENSE")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a copy of what a build reads: what an earlier build left beside the sources says nothing there."""
    homes = ["k2quant", *(link.name for link in (ROOT / "k2quant").iterdir() if link.is_symlink())]
    caches = shutil.ignore_patterns("__pycache__")
    for name in homes:
        shutil.copytree(ROOT / name, tmp_path / "copy" / name, symlinks=True, ignore=caches)
    for name in BESIDE:
        shutil.copyfile(ROOT / name, tmp_path / "copy" / name)
    return tmp_path / "copy"


def test_the_wheel_is_the_package(checkout: Path) -> None:
    """Every module, table and text below `k2quant/`, links followed, is in the wheel, and no other file."""
    names = packaged(checkout)
    assert differences(checkout, names, what="the wheel") == []
    assert package_files(checkout) == set(names), "the wheel has a second top-level name"
    assert {"k2quant/py.typed", "k2quant/kernels/ops.py", "k2quant/cli/__init__.py"} <= set(names)


def test_what_a_wheel_lacks_is_found(checkout: Path) -> None:
    """Settings that leave out tables, or the folders without `__init__.py`, make a wheel that is not whole."""
    settings = checkout / "pyproject.toml"
    text = settings.read_text()
    assert '"*.json", ' in text
    settings.write_text(text.replace('"*.json", ', "").replace('["k2quant*"]', '["k2quant*"]\nnamespaces = false'))
    found = differences(checkout, packaged(checkout), what="the wheel")
    tables = {name for name in package_files(checkout) if name.endswith(".json") or "/kernels/" in name}
    assert tables
    assert found == [f"the wheel lacks {name}" for name in sorted(tables)]


def test_what_a_wheel_has_too_much_is_found(checkout: Path) -> None:
    """A file that is no module, table or text of the package does not belong into the wheel."""
    names = [*package_files(checkout), "k2quant/notes.md", "k2quant-0.1.0.dist-info/METADATA"]
    found = differences(checkout, names, what="the wheel")
    assert found == ["the wheel holds k2quant/notes.md, which is no file of the package"]
