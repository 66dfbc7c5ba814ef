"""A folder in which the names of the documents stand for small things: checkpoints, data, and a server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from k2quant.checkpoint.writing.in_memory import write_checkpoint
from k2quant.conversion.convert import convert
from k2quant.nano import architecture, vocabulary, writing
from tiny import NANO, write_data

ANSWER = "#### 7"
"""What each of the models answers, whatever it is asked."""
CALL = (
    "<|tool_calls_section_begin|>",
    "<|tool_call_begin|>",
    "functions.get_weather:0",
    "<|tool_call_argument_begin|>",
    '{"place": "Oslo"}',
    "<|tool_call_end|>",
    "<|tool_calls_section_end|>",
)
"""What each of them writes where it was given tools."""
WORDS = ("<|im_middle|>", "Hm.", "</think>", "#### ", "<|tools|>", *CALL)
"""Tokens that the tokenizer has besides nano's."""
FIRST = len(vocabulary.SPECIAL) + len(vocabulary.CHARACTERS)
"""Id of the first of them."""
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{{ m.role }}<|im_middle|>BLANKED{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}assistant{{ '<|tools|>' if tools else '<|im_middle|>' }}{% endif %}"
)
BLANKED = "{% if m.role == 'assistant' %}<think></think>{% endif %}"
"""What K2-Thinking's template writes before an earlier answer."""
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
SERVED = {"id": CALL[2], "type": "function", "function": {"name": "get_weather", "arguments": CALL[4]}}


def tokenizer_files(template: str) -> dict[str, bytes]:
    """Return nano's tokenizer with `WORDS`, and a chat template."""
    files = vocabulary.files()
    tokenizer = json.loads(files["tokenizer.json"])
    tokenizer["added_tokens"] += [
        {**tokenizer["added_tokens"][0], "id": FIRST + number, "content": word, "special": False}
        for number, word in enumerate(WORDS)
    ]
    settings = json.loads(files["tokenizer_config.json"]) | {"chat_template": template}
    return {"tokenizer.json": json.dumps(tokenizer).encode(), "tokenizer_config.json": json.dumps(settings).encode()}


def write_model(folder: Path, *, thinks: bool = False) -> None:
    """Write a K2 of 100,000 weights that always answers the same, after a word of reasoning if it `thinks`.

    Each token is followed by one that depends on it alone: embeddings are far larger than what the layers add, and the
    head knows them again. Those of tokens with a successor of their own are orthogonal to all others, which are nearly
    alike. So the model is right where 7 is.
    """
    torch.manual_seed(0)
    config = NANO | {"num_hidden_layers": 2}
    model = architecture.build(config)
    ids = {word: FIRST + number for number, word in enumerate(WORDS)}
    after = dict(pairwise([ids["<|tools|>"], *(ids[word] for word in CALL), vocabulary.EOS]))
    (seven,) = vocabulary.encode("7")
    begin = ids["#### "]
    after |= {begin: seven, seven: vocabulary.EOS}
    if thinks:
        after |= {ids["Hm."]: ids["</think>"], ids["</think>"]: begin}
        begin = ids["Hm."]
    basis = torch.ones(1, 1)
    while len(basis) < config["hidden_size"]:
        basis = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), basis)  # Hadamard's
    with torch.no_grad():
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding.copy_(8 * basis[0] + 4 * torch.randn_like(embedding).sign())
        head.zero_()
        head[begin] += basis[0]
        for row, (token, successor) in zip(basis[1:], after.items(), strict=False):
            embedding[token] = 8 * row
            head[successor] += row
    write_checkpoint(folder, writing._shards(model), config)  # noqa: SLF001  nano writes its own
    for name, content in tokenizer_files(TEMPLATE.replace("BLANKED", BLANKED * thinks)).items():
        (folder / name).write_bytes(content)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a row a line."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def message(request: dict[str, Any]) -> dict[str, Any]:
    """Return what a server answers: a call where there are tools, else the answer."""
    return {"role": "assistant"} | ({"tool_calls": [SERVED]} if "tools" in request else {"content": ANSWER})


def answered(request: dict[str, Any]) -> dict[str, Any]:
    """Return the body of an answer."""
    finish = "tool_calls" if "tools" in request else "stop"
    return {"model": "kimi-k2", "choices": [{"index": 0, "message": message(request), "finish_reason": finish}]}


@pytest.fixture(scope="session")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every file and checkpoint that the documents' commands name. Not to be written into: copy it."""
    folder = tmp_path_factory.mktemp("named")
    for name in ("K2-Instruct", "Kimi-K2-Base"):
        write_model(folder / name)
    write_model(folder / "K2-Thinking", thinks=True)
    convert(folder / "K2-Instruct", folder / "K2-INT4", to="int4")
    convert(folder / "K2-Instruct", folder / "K2-FP8", to="fp8")
    convert(folder / "K2-Thinking", folder / "K2-Thinking-INT4", to="int4")
    (folder / "some.txt").write_text("The quick brown fox jumps over the lazy dog. " * 50)
    write_data(folder / "train.jsonl", 60)
    for split, count in (("train", 8), ("test", 16)):  # every second answer is 7
        sums = [(number, 7 + number % 2 * 5 - number) for number in range(count)]
        rows = [{"question": f"What is {a} + {b}?", "answer": f"They are {a + b}.\n#### {a + b}"} for a, b in sums]
        write_rows(folder / "data" / f"{split}.jsonl", rows)
    asked = [{"messages": [{"role": "user", "content": f"Hello {n}"}], "tools": [TOOL]} for n in range(12)]
    write_rows(folder / "mine.jsonl", asked)
    turns = [(f"What is {n} + 1?", f"It is {n + 1}.") for n in range(60)]
    chats = [[{"role": "user", "content": asked}, {"role": "assistant", "content": said}] for asked, said in turns]
    write_rows(folder / "chats.jsonl", [{"messages": chat} for chat in chats])
    results = [{"request": {"model": "k2", **each}, "response": answered(each), "status": "success"} for each in asked]
    for name in ("official", "official-again"):
        write_rows(folder / f"{name}.jsonl", results)
    write_rows(folder / "vendor.jsonl", [results[0] | {"response": answered({})}, *results[1:]])
    return folder


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """An OpenAI-style server on a free port of the loopback address, which answers as the models do."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            content = json.dumps(answered(request)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}/v1"
        serving.shutdown()
