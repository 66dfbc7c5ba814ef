"""What is quoted of another library's error."""

from __future__ import annotations

from k2quant.ground.saying.faults import said


def test_short_errors_are_quoted_whole() -> None:
    """Kind and words, in one line; an error without words has its kind."""
    assert said(KeyError("kimi_k2")) == "KeyError: 'kimi_k2'"
    assert said(ValueError("first\n\n  second\tthird")) == "ValueError: first second third"
    assert said(MemoryError()) == "MemoryError"
    assert said(OSError("x" * 800)) == f"OSError: {'x' * 800}"


def test_long_errors_keep_both_ends() -> None:
    """A traceback's cause stands in its last line, which no cut at a number of letters may lose."""
    last = "ImportError: cannot import name 'is_torch_fx'"
    found = said(RuntimeError("The model cannot be loaded:\n" + "  File somewhere, line 1\n" * 500 + last))
    assert found.startswith("RuntimeError: The model cannot be loaded: File")
    assert found.endswith(last)
    assert " ... " in found
    assert len(found) < 850
