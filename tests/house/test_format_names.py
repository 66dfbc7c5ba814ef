"""How many places know the formats by heart: names of formats and tests of their classes, counted by file.

As a script it prints the counts of a checkout, of any age, so that two can be compared:

    python tests/house/test_format_names.py [ROOT]
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "shared"))  # of a script nobody else says where that is

from graph import parse
from places import ROOT

HOMES = ("k2quant", "kernels", "qat", "calib", "eval", "exports")

NAMES = {"bf16", "fp8", "int4", "nvfp4", "mxfp4"}

CLASSES = {"Bf16", "Fp8", "Int4", "Nvfp4", "Mxfp4", "Fp8Weight", "Int4Weight", "Nvfp4Weight", "Mxfp4Weight"}

OWN = ("k2quant/formats/", "kernels/codecs/", "kernels/products/", "kernels/tuning/compiling.py")
"""What a format is stands here: its bytes, its codecs, its products."""

DEFAULTS: dict[str, int] = {
    "calib/solving/solve.py": 1,  # what is solved for unless a call says otherwise
    "k2quant/cli/calibrate.py": 1,  # what statistics are taken for, in the command that comes next
    "k2quant/ground/release.py": 1,  # the config of the published model says fp8
    "k2quant/nano/demo.py": 13,  # the formats that the demo writes, step by step
    "qat/config.py": 1,  # what is trained for unless a job says otherwise
    "qat/rounding/estimators.py": 1,  # the same, of the function by itself
}
"""Other files, with how many names each may hold since a format is chosen there and not told from others."""


@cache
def lines_of(root: Path) -> dict[str, list[int]]:
    """Return the lines on which a checkout names a format, by file; a line once for each name or test of a class."""
    lines = {}
    for path in sorted(path for home in HOMES for path in (root / home).rglob("*.py")):
        if not any(above.is_symlink() for above in path.parents if above != root and above.is_relative_to(root)):
            here = sorted(named(parse(path)))
            if here:
                lines[path.relative_to(root).as_posix()] = here
    return lines


def counts(root: Path) -> dict[str, int]:
    """Return how often each file of a checkout names a format; those that never do are left out."""
    return {name: len(lines) for name, lines in lines_of(root).items()}


def named(tree: ast.Module) -> Iterator[int]:
    """Yield a line for each string that is the name of a format, and for each test of a format's class.

    Tests are calls of `isinstance` and `issubclass`, class patterns of `match`, comparisons by `is` and `==`, and
    unions in annotations; each counts once, however many classes it names. A string that stands alone is a docstring
    and does not count.
    """
    alone = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(text)) if text in NAMES and node not in alone:
                yield node.lineno
            case ast.Call(func=ast.Name(id="isinstance" | "issubclass"), args=[_, kinds]) if names_class(kinds):
                yield node.lineno
            case ast.MatchClass(cls=kind) if names_class(kind):
                yield node.lineno
            case ast.Compare(ops=ops) if any(isinstance(op, ast.Is | ast.IsNot | ast.Eq | ast.NotEq) for op in ops):
                if any(is_class(side) for side in (node.left, *node.comparators)):
                    yield node.lineno
            case ast.AnnAssign() | ast.arg() if node.annotation is not None:
                yield from unions(node.annotation)
            case ast.FunctionDef() | ast.AsyncFunctionDef() if node.returns is not None:
                yield from unions(node.returns)
            case _:
                pass


def unions(annotation: ast.expr) -> Iterator[int]:
    """Yield a line for each `X | Y` of an annotation that names a format's class, whole unions alone."""
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        if names_class(annotation):
            yield annotation.lineno
    else:
        for part in ast.iter_child_nodes(annotation):
            if isinstance(part, ast.expr):
                yield from unions(part)


def is_class(node: ast.expr) -> bool:
    """Tell whether an expression is a format's class: `Fp8`, `layouts.Fp8`."""
    return getattr(node, "id", None) in CLASSES or getattr(node, "attr", None) in CLASSES


def names_class(node: ast.expr) -> bool:
    """Tell whether a format's class stands anywhere in an expression."""
    return any(is_class(part) for part in ast.walk(node) if isinstance(part, ast.expr))


def strangers(root: Path) -> dict[str, int]:
    """Return the files that name formats although none is defined there, more often than defaults are chosen there."""
    return {
        name: count
        for name, count in counts(root).items()
        if not name.startswith(OWN) and count > DEFAULTS.get(name, 0)
    }


def test_a_format_is_known_in_its_own_files() -> None:
    """Outside of the files of formats, codecs and products, a format is named where it is chosen by default alone."""
    found = [
        f"{name}: {count}, of which {DEFAULTS.get(name, 0)} are defaults" for name, count in strangers(ROOT).items()
    ]
    assert not found, "\n".join(found)


def test_no_default_is_left_over() -> None:
    """A file of `DEFAULTS` names formats no less often than that says, so that the table shrinks with them."""
    here = counts(ROOT)
    assert [name for name, count in DEFAULTS.items() if here.get(name, 0) < count] == []


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ('to = "int4"', 1),
        ('f"{x}int4" == f"fp8 {x}"', 1),
        ('Literal["bf16", "fp8", "int4"]', 3),
        ('"int4 is a format"; "INT4"', 0),
        ('"int4"', 0),
        ('def f():\n    """fp8"""', 0),
        ("isinstance(x, Fp8 | Int4)", 1),
        ("isinstance(x, (layouts.Bf16, Fp8Weight)); isinstance(x, Fp8Layout)", 1),
        ("match x:\n    case Bf16(): pass\n    case Fp8() | Int4(): pass", 3),
        ("type(x) is Int4; x.kind == Fp8; kind is not weights.Int4Weight; x in (Fp8,)", 3),
        ("def f(x: Fp8 | Int4 | None, y: list[Bf16 | Fp8], z: Fp8) -> Fp8Weight | Int4Weight: ...", 3),
        ("x: dict[str, Fp8 | Int4]\nAny = Fp8 | Int4", 1),
    ],
)
def test_what_counts(text: str, count: int) -> None:
    """Names of formats, tests of their classes and unions of them count; text about them does not."""
    assert len(list(named(ast.parse(text)))) == count


def test_a_stranger_is_found(tmp_path: Path) -> None:
    """A file that tells formats apart is named with its count; a codec is not, nor is a linked folder counted twice."""
    for name in ("k2quant/checking", "kernels/codecs"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "k2quant" / "kernels").symlink_to("../kernels")
    (tmp_path / "k2quant" / "checking" / "a.py").write_text('if to == "fp8" or isinstance(x, Int4): pass\n')
    (tmp_path / "kernels" / "codecs" / "b.py").write_text('NAME = "int4"\n')
    assert counts(tmp_path) == {"k2quant/checking/a.py": 2, "kernels/codecs/b.py": 1}
    assert strangers(tmp_path) == {"k2quant/checking/a.py": 2}


def main(root: Path) -> None:
    """Print files, lines and sums of a checkout."""
    here = lines_of(root)
    for name, lines in here.items():
        print(f"{len(lines):4} {name}: {', '.join(map(str, dict.fromkeys(lines)))}")  # noqa: T201
    homes = {"all": ("",), "outside k2quant/formats and kernels": ("k2quant/", "qat/", "calib/", "eval/", "exports/")}
    for what, starts in homes.items():
        some = {
            name: lines
            for name, lines in here.items()
            if name.startswith(starts) and (what == "all" or not name.startswith("k2quant/formats"))
        }
        different = sum(len(set(lines)) for lines in some.values())
        print(f"{what}: {len(some)} files, {different} lines, {sum(map(len, some.values()))} names")  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT)
