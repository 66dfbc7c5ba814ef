"""What Ray, its processes and libraries on other machines say is shown without secrets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from k2quant.conversion.spreading import cluster
from k2quant.conversion.spreading.meeting import words
from k2quant.conversion.spreading.worker import sendable
from k2quant.errors import BadValue, ClusterError

PLANTED = "open/sesame+for+forty+robbers"


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a secret that this machine knows by its environment alone."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", PLANTED)


def test_words_of_an_error_are_cleaned_before_they_are_cut() -> None:
    """Half a secret would not be known for one; of several lines the first that says something counts."""
    said = words(OSError(f"\n  {'x' * 280} {PLANTED}\nmore"))
    assert said.startswith("OSError: xxx")
    assert "sesame" not in said
    assert "more" not in said
    assert words(ValueError("ray://me:sesame@head:1 refused")) == "ValueError: ray://[hidden]@head:1 refused"


def test_an_error_leaves_a_worker_without_the_secrets_of_its_machine() -> None:
    """Errors of ours go as they are, others as they are where they travel and hold nothing."""

    class Odd(Exception):
        """Cannot be pickled: it is nobody's but this function's."""

    ours, plain = BadValue("no number"), OSError("no room")
    assert sendable(ours) is ours
    assert sendable(plain) is plain
    for error, said in (
        (OSError(f"denied for {PLANTED}"), "OSError: denied for [hidden]"),
        (Odd(f"odd {PLANTED}"), "Odd: odd [hidden]"),
        (Odd("odd"), "Odd: odd"),
    ):
        found = sendable(error)
        assert type(found) is RuntimeError
        assert str(found) == said


def test_the_last_words_of_a_driver_are_cleaned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whatever ends the process that speaks with Ray, the last line stands in the error."""
    said = f"first\ngone with {PLANTED} of ray://me:sesame@head:1"
    monkeypatch.setattr(cluster, "_DRIVER", f"raise SystemExit({said!r})")
    asked: Any = SimpleNamespace(as_json=dict, device="cpu")
    with pytest.raises(
        ClusterError, match=r"cluster was lost.*found gone with \[hidden\] of ray://\[hidden\]@"
    ) as lost:
        cluster.look_over("ray://head:1", asked, workers=None)
    assert "sesame" not in str(lost.value)
