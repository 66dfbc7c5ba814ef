r"""Export small models to GGUF, ask llama.cpp about them, and set what it says beside what we say.

Usage, with the Python of an environment that has llama-cpp-python, as `make gguf-oracle` does it:
    PYTHONPATH=tests/shared:benchmarks python benchmarks/suites/exports/gguf_oracle.py build/llama/bin/python \
        tests/data/golden_llama_cpp.json [NANO]

NANO is the folder of a trained nano-K2, which is asked about as well. What is kept: of each text the ids; of each model
how many of 200 greedy tokens are equal, and where the first is not, how far the two best were apart there.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

import kimi_files
from k2quant.conversion.convert import convert
from k2quant.exports import export_gguf
from k2quant.exports.gguf.vocabulary import vocabulary
from k2quant.model import load_model
from k2quant.model.generation import load_tokenizer
from suites.exports.gguf_texts import TEXTS

STEPS = 200
AS_TRAINED = {"yarn_beta_fast": 1.0, "yarn_beta_slow": 1.0}
"""What K2's config says. llama.cpp takes 32 and 1 for `deepseek2` unless it is told otherwise when it starts."""
PROMPT = "The quick brown fox"
NANO_PROMPT = "A85640+1="


class Case(NamedTuple):
    """A model that both run."""

    folder: Path
    prompt: str


class Run(NamedTuple):
    """What we make of a model."""

    prompt: list[int]
    tokens: list[int]
    """Greedy, each given the ones before."""
    logits: NDArray[np.float32]
    """Before each of them."""


def cases(home: Path, nano: Path | None) -> dict[str, Case]:
    """Write the models."""
    found = {}
    for label, write in {
        "kimi": kimi_files.write_kimi,
        "deepseek": kimi_files.write_deepseek,
        "nano": kimi_files.write_nano,
    }.items():
        folder = home / label
        folder.mkdir()
        kimi_files.write_model(folder, write(folder))
        found[label] = Case(folder, NANO_PROMPT if label == "nano" else PROMPT)
    if nano is not None:
        found["nano"] = Case(nano, NANO_PROMPT)
    for label in ("kimi", "nano"):
        folder = convert(found[label].folder, home / f"{label}-int4", to="int4").folder
        found[folder.name] = Case(folder, found[label].prompt)
    return found


def ours(case: Case) -> Run:
    """Run a model on the values that its weights mean, in float32."""
    model, tokenizer = load_model(case.folder, dtype=torch.float32, backend="decoded"), load_tokenizer(case.folder)
    prompt = tokenizer(case.prompt)["input_ids"]
    tokens: list[int] = []
    rows, memory = [], DynamicCache()
    for _ in range(STEPS):
        with torch.inference_mode():
            new = torch.tensor([tokens[-1:] or prompt])
            logits = model(new, past_key_values=memory, use_cache=True).logits[0, -1]
        rows.append(logits.numpy())
        tokens.append(int(logits.argmax()))
    return Run(prompt, tokens, np.stack(rows))


def beside(run: Run, theirs: NDArray[np.float32], tokens: list[int]) -> dict[str, Any]:
    """Return how far what they say is from what we say."""
    equal = next((step for step in range(STEPS) if tokens[step] != run.tokens[step]), STEPS)
    apart = np.abs(theirs - run.logits)
    said: dict[str, Any] = {
        "tokens_equal_from_the_first": equal,
        "tokens_equal_along_ours": int((theirs.argmax(1) == run.logits.argmax(1)).sum()),
        "logits_apart_most": float(apart.max()),
        "logits_apart_mean": float(apart.mean()),
        "logits_spread": float(run.logits.std()),
    }
    if equal < STEPS:
        second, first = np.sort(run.logits[equal])[-2:]
        said["first_difference"] = {
            "two_best_apart": float(first - second),
            "logits_apart_most": float(apart[equal].max()),
        }
    return said


def digest(folder: Path) -> str:
    """Return the SHA-256 of all that GGUF says of a tokenizer."""
    config = json.loads((folder / "config.json").read_text())
    return hashlib.sha256(json.dumps(vocabulary(folder, config)).encode()).hexdigest()


def main() -> None:
    """Ask, compare and keep."""
    python, target, *more = sys.argv[1:]
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        asked = cases(home, Path(more[0]) if more else None)
        runs = {label: ours(case) for label, case in asked.items()}
        request: dict[str, Any] = {}
        for label, case in asked.items():
            file = export_gguf(case.folder, home / f"{label}.gguf", rest="f32").file
            question: dict[str, Any] = {"file": str(file), "texts": list(TEXTS.values()), "prompt": runs[label].prompt}
            question |= {"steps": STEPS, "follow": runs[label].tokens}
            request[label] = question | {"options": AS_TRAINED}
            request[f"{label}-unasked"] = question | {"options": {}, "texts": []}
        (home / "request.json").write_text(json.dumps({"models": request}))
        engine = Path(__file__).with_name("gguf_engine.py")
        subprocess.run([python, engine, home / "request.json", home / "answer.json"], check=True)
        answer = json.loads((home / "answer.json").read_text())
        kept: dict[str, Any] = {
            "llama-cpp-python": answer["llama-cpp-python"],
            "options": AS_TRAINED,
            "nano_is_trained": bool(more),
            "steps": STEPS,
            "texts": {},
            "models": {},
        }
        for label, said in answer["models"].items():
            run = runs[label.removesuffix("-unasked")]
            theirs = np.fromfile(home / f"{label}.f32", "<f4").reshape(run.logits.shape)
            kept["models"][label] = beside(run, theirs, said["tokens"])
        for label in ("kimi", "deepseek", "nano"):
            said = answer["models"][label]
            kept["texts"][label] = {
                "vocabulary_sha256": digest(asked[label].folder),
                "texts": {
                    name: {"text": text, "ids": ids, "shown": shown}
                    for (name, text), ids, shown in zip(TEXTS.items(), said["ids"], said["shown"], strict=True)
                },
            }
            compare_texts(asked[label].folder, dict(zip(TEXTS, said["ids"], strict=True)))
    Path(target).write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(kept["models"], indent=1))


def compare_texts(folder: Path, theirs: dict[str, list[int]]) -> None:
    """Print texts of which our ids are others."""
    tokenizer = load_tokenizer(folder)
    for name, ids in theirs.items():
        mine = tokenizer(TEXTS[name], add_special_tokens=False)["input_ids"]
        if mine != ids:
            spelled = (" ".join(tokenizer.convert_ids_to_tokens(each)) for each in (mine, ids))
            print(f"{folder.name}: {name}:", *spelled, sep="\n  ")


if __name__ == "__main__":
    main()
