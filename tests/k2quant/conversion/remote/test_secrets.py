"""Tokens and keys are planted wherever they can come from; every byte that is written or said is searched for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from served.hub import Hub, hub
from served.s3 import KEY, SECRET, Store, serving

NAME = "org/Kimi-K2-Small"
PLANTED = {
    "of the variable": "hf_plantedInTheVariable00",
    "of the file": "hf_plantedInTheTokenFile00",
    "of other logins": "hf_plantedInStoredTokens00",
    "AWS's key": KEY,
    "AWS's secret": SECRET,
    "AWS's session": "plantedSessionOfAws+/=0000",
    "a profile of AWS": "plantedSecretInAProfile/0000",
    "Google's key": "plantedPrivateKeyOfGoogle0000",
    "Google's refresh": "1//plantedRefreshOfGoogle0000",
    "user of an address": "plantedUserOfAnAddress",
    "password of an address": "plantedPasswordOfAnAddress",
    "query of an address": "plantedQueryOfAnAddress",
    "signature in a message": "plantedSignatureInAMessage",
    "cookie in a header": "plantedCookieInAHeader",
}
"""By where it stands."""


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    """An object store."""
    with serving() as found:
        found.make("output")
        yield found


@pytest.fixture
def server(k2_source: Path, tmp_path: Path) -> Iterator[Hub]:
    """A hub that has the model, with a large file among the small ones, and knows the variable's token."""
    with hub(tmp_path / "hub") as made:
        made.repo(NAME, k2_source)
        made.commit(NAME, {"tiktoken.model": b"aGk= 0\n" * 1000})
        made.repos[NAME].private = True
        made.token = PLANTED["of the variable"]
        yield made


@pytest.fixture
def planted(server: Hub, store: Store, tmp_path: Path) -> tuple[dict[str, str], set[Path]]:
    """An environment with a secret in each of its places, and the files that hold some."""
    home = tmp_path / "person"
    google = {
        "type": "authorized_user",
        "refresh_token": PLANTED["Google's refresh"],
        "client_secret": PLANTED["Google's key"],
    }
    files = {
        server.home / "token": PLANTED["of the file"],
        server.home / "stored_tokens": f"[other]\nhf_token = {PLANTED['of other logins']}\n",
        home / ".aws" / "credentials": f"[default]\naws_secret_access_key = {PLANTED['a profile of AWS']}\n",
        home / ".config" / "gcloud" / "application_default_credentials.json": json.dumps(google),
    }
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    environment = os.environ | server.environment(PLANTED["of the variable"]) | store.environment
    environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    environment |= {"AWS_SESSION_TOKEN": PLANTED["AWS's session"]}
    return environment, set(files)


def run(*words: str | Path, environment: dict[str, str], code: int) -> str:
    """What a command says, on both of its streams, at its most talkative."""
    command = [sys.executable, "-m", "k2quant", *map(str, words), "-v"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_nothing_that_is_planted_is_found_again(
    server: Hub, store: Store, planted: tuple[dict[str, str], set[Path]], tmp_path: Path
) -> None:
    """Down and up, through faults and refusals, to a folder and to a bucket: no file, line or object has it."""
    environment, own = planted
    said = []

    def do(*words: str | Path, code: int = 0) -> None:
        said.append(run(*words, environment=environment, code=code))

    server.fault("status", file="*.safetensors", nth=2, status=503, times=1, headers={"Retry-After": "0"})
    server.fault("drop", file="*.safetensors", nth=4, after=1000)
    server.fault("drop", file="tiktoken.model", after=100)
    do("convert", "--to", "int4", f"hf://{NAME}", tmp_path / "out")
    do("convert", "--to", "int4", f"hf://{NAME}", "s3://output/k2")
    do("push", tmp_path / "out", "hf://somebody/K2-INT4")
    do("inspect", f"hf://{NAME}")
    server.faults.clear()
    echo = (
        f"Bearer {PLANTED['of the variable']} at https://{PLANTED['user of an address']}:"
        f"{PLANTED['password of an address']}@host/x?X-Amz-Signature={PLANTED['signature in a message']}"
    )
    told = {"X-Error-Message": echo, "Set-Cookie": f"token={PLANTED['cookie in a header']}"}
    for on in ("content", "resolve", "info"):
        server.fault(
            "status", on=on, nth=2 if on == "content" else 1, status=403, times=None, headers=told, body=echo.encode()
        )
        do("convert", "--to", "bf16", f"hf://{NAME}", tmp_path / f"refused-{on}", code=1)
        server.faults.clear()
    server.fault("status", on="batch", status=403, times=None, headers=told, body=echo.encode())
    do("push", tmp_path / "out", "hf://somebody/other", code=1)
    user, password = PLANTED["user of an address"], PLANTED["password of an address"]
    do("convert", "--to", "int4", f"s3://{user}:{password}@bucket/x", tmp_path / "a", code=2)
    do("convert", "--to", "int4", f"hf://{user}:{password}@{NAME}", tmp_path / "a", code=2)
    do("convert", "--to", "int4", f"hf://{NAME}?token={PLANTED['query of an address']}", tmp_path / "a", code=2)
    do("inspect", f"https://{user}:{password}@host/{NAME}", code=2)
    where = {f"what command {number} said": text.encode() for number, text in enumerate(said)}
    where |= {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path not in own}
    where |= {f"s3://output/{name}": data for name, data in store.contents("output").items()}
    for name in server.repos:
        where |= {f"{name}/{file}": blob.read(0, blob.size) for file, blob in server.files(name).items()}
    assert len(where) > 40
    secrets = PLANTED | {"signed addresses": server.secret}
    found = [
        (place, what) for place, data in where.items() for what, secret in secrets.items() if secret.encode() in data
    ]
    assert found == []
    assert {seen.host for seen in server.seen if seen.token} == {"hub"}
