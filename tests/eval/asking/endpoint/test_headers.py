"""Keys come from the environment, go into headers, and are shown nowhere."""

from __future__ import annotations

import pytest

from k2quant.errors import UsageError
from k2quant.eval.asking.endpoint.headers import check_headers, hidden, read_headers


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def test_openais_variable_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody need name it, another `Authorization` takes its place, and without either nothing is sent."""
    assert read_headers({}) == {}
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1 ")
    monkeypatch.setenv("MINE", "Basic abc")
    assert read_headers({}) == {"Authorization": "Bearer sk-1"}
    assert read_headers({"authorization": "MINE"}) == {"authorization": "Basic abc"}
    assert read_headers({"X-Api-Key": "MINE"}) == {"X-Api-Key": "Basic abc", "Authorization": "Bearer sk-1"}


@pytest.mark.parametrize("value", [None, "", " ", "two\nlines", "s\x00", "sëcret"])
def test_a_value_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    """A variable that is not set, or would become two headers; the variable is named, not what it holds."""
    if value is not None and "\x00" not in value:
        monkeypatch.setenv("MINE", value)
    with pytest.raises(UsageError, match="MINE") as caught:
        read_headers({"X-Key": "MINE"})
    assert value is None or not value.strip() or value not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "variable"),
    [
        ("X Key", "MINE"),
        ("X-Key:", "MINE"),
        ("", "MINE"),
        ("Host", "MINE"),
        ("content-length", "MINE"),
        ("X-Key", "Bearer sk-secret"),
        ("X-Key", "$MINE"),
        ("X-Key", ""),
    ],
)
def test_what_is_no_header_or_no_variable_is_refused(name: str, variable: str) -> None:
    """Before the environment is looked at; what may be a key itself is not repeated."""
    with pytest.raises(UsageError) as caught:
        check_headers({name: variable})
    assert "secret" not in str(caught.value)


def test_a_text_loses_keys_and_nothing_else() -> None:
    """With the scheme before them, without it, and as JSON has them; short values hide no sentence."""
    headers = {"Authorization": "Bearer sk-12", "X-A": 'q"uote', "X-B": "at"}
    assert hidden('Bearer sk-12, sk-12, q"uote and q\\"uote at night', headers) == "***, ***, *** and *** at night"
