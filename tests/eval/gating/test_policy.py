"""The policy file and shares as people write them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from k2quant.errors import UsageError
from k2quant.eval.gating.policy import Policy, read_policy, share


@pytest.mark.parametrize("text", ["1pp", "1 pp", "1%", "1.0%", "0.01", ".01"])
def test_a_share_is_read_as_people_write_it(text: str) -> None:
    """Percentage points, percent and plain numbers mean the same."""
    assert share(text) == pytest.approx(0.01, abs=1e-15)


@pytest.mark.parametrize("text", ["", "pp", "one", "-1pp", "1ppp", "1e-2", "nan", "inf", "1,5%"])
def test_what_is_no_share_is_refused(text: str) -> None:
    """Nothing is guessed."""
    with pytest.raises(UsageError, match="is no share"):
        share(text)


def test_a_policy_file_is_read(tmp_path: Path) -> None:
    """Margins stand as shares or numbers, tasks with or without a margin of their own."""
    path = tmp_path / "gate.yaml"
    path.write_text("margin: 1pp\nalpha: 0.025\npower: 90%\ntasks:\n  gsm8k: 2pp\n  bbh:\n", encoding="utf-8")
    policy = read_policy(path)
    assert policy == Policy(margin=0.01, alpha=0.025, power=0.9, tasks={"gsm8k": 0.02, "bbh": None})
    assert (policy.margin_of("gsm8k"), policy.margin_of("bbh")) == (0.02, 0.01)


def test_tasks_may_be_a_list(tmp_path: Path) -> None:
    """A list of names is enough where no task has a margin of its own."""
    path = tmp_path / "gate.yaml"
    path.write_text("tasks: [gsm8k, bbh]\n", encoding="utf-8")
    assert read_policy(path).tasks == {"gsm8k": None, "bbh": None}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("margin: 0", "margin"),
        ("margin: 60pp", "margin"),
        ("margin: [1]", "margin"),
        ("alpha: true", "alpha"),
        ("alpha: .nan", "alpha"),
        ("power: 1.0", "power"),
        ("margn: 1pp", "unknown key 'margn'"),
        ("margin: 1pp\nmargin: 9pp", "a key stands twice"),
        ("tasks: {a: 99pp}", "margin of a"),
        ("tasks: 3", "tasks"),
        ("- 1", "keys and values"),
        ("", "keys and values"),
        ("a: &a [x, x]\nb: [*a, *a]", "aliases"),
        ("a: [" * 5000, "not YAML"),
        ("margin: !!python/object/apply:os.system [ls]", "not YAML"),
        ("\x00", "not YAML"),
        ('margin: !!int ""', "not YAML"),
        ('margin: !!bool "x"', "not YAML"),
        ('margin: !!timestamp "x"', "not YAML"),
        ("margin: " + "1" * 400, "margin"),
        ("margin: " + "1:" * 400 + "1.5", "not YAML|margin"),
        ("margin: 1.0e-320", "margin"),
        ("alpha: 1.0e-17", "alpha"),
    ],
)
def test_a_bad_policy_is_refused(text: str, message: str, tmp_path: Path) -> None:
    """Unknown keys, doubled keys, values without sense and YAML that does more than hold data: one line, by name."""
    path = tmp_path / "gate.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=message) as caught:
        read_policy(path)
    assert str(path) in str(caught.value)


def test_a_policy_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    """A missing file, a folder and a pipe, which must not block."""
    os.mkfifo(tmp_path / "pipe")
    for name in ("missing", ".", "pipe"):
        with pytest.raises(UsageError):
            read_policy(tmp_path / name)
