"""What is tried again, how long is waited, and what no message repeats."""

from __future__ import annotations

import errno
import time
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from k2quant.checkpoint.remote.retrying import TRIES, Transient, retried, retry_after, transient
from k2quant.checkpoint.remote.secrets import HIDDEN, clean
from k2quant.errors import CheckpointError


class Refusal(Exception):
    """What a library raises for an answer."""

    def __init__(self, response: Any) -> None:
        """Keep the answer."""
        super().__init__("refused")
        self.response = response


def http(status: int, **headers: str) -> Refusal:
    """Return an error as httpx has it."""
    return Refusal(SimpleNamespace(status_code=status, headers=headers))


def boto(status: int) -> Refusal:
    """Return an error as botocore has it."""
    return Refusal({"ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": {}}})


@pytest.mark.parametrize(
    "error", [http(429), http(503), boto(500), ConnectionResetError(), TimeoutError(), Transient("")]
)
def test_what_may_pass_is_tried_again(error: Exception, waits: list[float]) -> None:
    """Twice it fails and then it goes well; it was waited for, ever longer."""
    left = [error, error]

    def work() -> str:
        if left:
            raise left.pop()
        return "well"

    assert retried("hf://a/b", work) == "well"
    assert len(waits) == 2
    assert 0 < waits[0] <= 0.5 < waits[1] * 2 <= 2


@pytest.mark.parametrize("error", [http(404), http(403), boto(412), ValueError(), OSError(errno.ENOSPC, "full")])
def test_what_no_other_try_mends_is_raised_at_once(error: Exception, waits: list[float]) -> None:
    """As it was, after no wait."""

    def work() -> None:
        raise error

    with pytest.raises(type(error)):
        retried("hf://a/b", work)
    assert not waits


def test_it_is_tried_so_often_and_no_more(waits: list[float]) -> None:
    """The error names what was read, what was found and what to do, and no signature."""
    left: list[None] = []

    def work() -> None:
        left.append(None)
        raise ConnectionError("https://host/a?Signature=sesame broke")

    with pytest.raises(CheckpointError, match="hf://a/b: cannot be reached, tried 8 times") as caught:
        retried("hf://a/b", work)
    assert (len(left), len(waits)) == (TRIES, TRIES - 1)
    assert "sesame" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_server_says_how_long_to_wait(waits: list[float]) -> None:
    """In seconds or by a date; no more than ten minutes, and never less than without a word of it."""
    assert retry_after({"retry-after": "7"}) == 7
    assert retry_after({"retry-after": "soon"}) is None
    assert 0 < (retry_after({"retry-after": formatdate(time.time() + 500, usegmt=True)}) or 0) <= 500
    for said in ("7", "99999999", formatdate(1000, usegmt=True)):
        left = [http(429, **{"retry-after": said})]

        def work(left: list[Refusal] = left) -> None:
            if left:
                raise left.pop()

        retried("hf://a/b", work)
    assert waits[:2] == [7, 600]
    assert 0.25 <= waits[2] <= 0.5  # what a first wait is without a word


def test_the_answer_behind_an_error_counts() -> None:
    """A library's own error is what caused it: a file that is not there is none that a wait brings."""
    outer = OSError("wrapped")
    outer.__cause__ = boto(503)
    assert transient(outer) is not None
    outer.__cause__ = boto(404)
    assert transient(outer) is None


@pytest.mark.parametrize(
    "text",
    [
        "GET https://user:sesame@host/a failed",
        "GET https://host/a?X-Amz-Signature=sesame&b=1 failed",
        "Authorization: Bearer sesame",
        "authorization=sesame",
        "{'aws_secret_access_key': 'sesame'}",
        "token hf_sesamesesame",
        "key AKIASESAME1234567",
        "password=sesame, again",
        "Bearer Basic sesame",
        "Invalid endpoint: user:sesame@host",
        "URL('foo://sesame:[secure]@host')",
    ],
)
def test_secrets_do_not_stay_in_texts(text: str) -> None:
    """Whatever form they come in; the rest of the text stays."""
    assert "sesame" not in clean(text).lower()
    assert HIDDEN in clean(text)


def test_what_the_environment_calls_secret_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable's value stands nowhere, in whatever form it was said; an ordinary text stays as it is."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "open/sesame+please")
    assert clean("it was open/sesame+please, once") == f"it was {HIDDEN}, once"
    plain = "https://huggingface.co/org/name: not found, 3 tokens of `model.layers.0.weight`"
    assert clean(plain) == plain


def test_what_the_files_of_amazons_tools_keep_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A secret stands nowhere for itself; a file that is none, or holds none, changes nothing."""
    kept = tmp_path / ".aws" / "credentials"
    kept.parent.mkdir()
    kept.write_text(
        "[default]\naws_access_key_id = AKIA1\naws_secret_access_key = open/sesame+please\nregion = somewhere"
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("AWS_SHARED_CREDENTIALS_FILE", raising=False)
    assert clean("somewhere it was open/sesame+please, once") == f"somewhere it was {HIDDEN}, once"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path))
    assert "sesame" in clean("open/sesame+please")


def test_a_wait_of_nothing_is_none_of_ours(waits: list[float]) -> None:
    """`Retry-After: 0` does not spend all tries at once."""

    def fail() -> None:
        raise Transient("status 503", after=0.0)

    with pytest.raises(CheckpointError, match="cannot be reached"):
        retried("hf://org/name", fail)
    assert len(waits) == TRIES - 1
    assert min(waits) > 0.2


def test_a_secret_that_a_cut_goes_through_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of libraries are cleaned before they are cut: half a secret is not known for one."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted+key/of+forty+letters/which+nobody+has")
    fault = transient(ConnectionError("x" * 290 + " planted+key/of+forty+letters/which+nobody+has"))
    assert fault is not None
    assert "planted" not in fault.found
