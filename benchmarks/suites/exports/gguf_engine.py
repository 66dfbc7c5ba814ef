"""Ask llama.cpp what it makes of GGUF files: ids of texts, and tokens and logits after a prompt.

Usage, in an environment with llama-cpp-python 0.3.36 (CPU), as `make gguf-oracle` makes one:
    python benchmarks/suites/exports/gguf_engine.py REQUEST.json ANSWER.json

It imports nothing of k2quant. REQUEST is {"models": {name: {"file": path, "texts": [text], "prompt": [id], "steps":
count, "follow": [id], "options": {name: value}}}}. ANSWER has for each model the ids of its texts, with special tokens
and without what stands before a text; the tokens that it takes by itself, greedily; and beside ANSWER, in NAME.f32,
the logits (float32, a row a step) along the tokens to follow.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import GGML_TYPE_F32, Llama, __version__  # of its own environment
from numpy.typing import NDArray


def opened(file: str, length: int, options: dict[str, Any]) -> Llama:
    """Return a model on one thread, with keys and values in float32."""
    common = {"n_ctx": length, "n_batch": length, "n_threads": 1, "n_threads_batch": 1, "seed": 0, "verbose": False}
    return Llama(file, **common, type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32, n_gpu_layers=0, **options)


def logits_along(model: Llama, prompt: list[int], tokens: list[int]) -> NDArray[np.float32]:
    """Return float32 `[len(tokens), vocabulary]`: what stands before each token, read one by one."""
    model.reset()
    model.eval(prompt)
    rows = []
    for token in tokens:
        rows.append(latest(model))
        model.eval([token])
    return np.stack(rows)


def latest(model: Llama) -> NDArray[np.float32]:
    """Return the logits after what was read last, float32 `[vocabulary]`."""
    return np.ctypeslib.as_array(model._ctx.get_logits_ith(-1), shape=(model.n_vocab(),)).copy()  # noqa: SLF001


def greedy(model: Llama, prompt: list[int], steps: int) -> list[int]:
    """Return the most probable tokens after a prompt, each given the ones before."""
    model.reset()
    model.eval(prompt)
    found: list[int] = []
    for _ in range(steps):
        found.append(int(latest(model).argmax()))
        model.eval(found[-1:])
    return found


def answer(name: str, asked: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return what there is to know of a model."""
    length = len(asked["prompt"]) + asked["steps"] + 1
    model = opened(asked["file"], max(length, 64), asked["options"])
    ids = [model.tokenize(text.encode(), add_bos=False, special=True) for text in asked["texts"]]
    shown = [model.detokenize(each, special=True).decode("utf-8", "replace") for each in ids]
    said: dict[str, Any] = {"ids": ids, "shown": shown}
    if asked["steps"]:
        said["tokens"] = greedy(model, asked["prompt"], asked["steps"])
        logits_along(model, asked["prompt"], asked["follow"]).astype("<f4").tofile(folder / f"{name}.f32")
    model.close()
    return said


def main() -> None:
    """Read what is asked, and write what is answered."""
    request, target = map(Path, sys.argv[1:3])
    asked = json.loads(request.read_text())
    models = {name: answer(name, model, target.parent) for name, model in asked["models"].items()}
    target.write_text(json.dumps({"llama-cpp-python": __version__, "models": models}))


if __name__ == "__main__":
    main()
