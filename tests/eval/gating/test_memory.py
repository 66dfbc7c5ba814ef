"""What a gate holds of large runs: no texts, neither of its items nor of those that flipped."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest

from k2quant.eval import gate
from k2quant.eval.gating import comparing
from k2quant.eval.runs import reading

ITEMS, WORDS = 3_000, "word " * 400


def written(folder: Path, items: int, flipped: int) -> Path:
    """Write a run of items of 6 kB, every so many of them wrong."""
    folder.mkdir(parents=True)
    path, digest = folder / "samples_t.jsonl", hashlib.sha256()
    with path.open("wb") as file:
        for number in range(items):
            right = number % 10 != flipped
            answer = f"{WORDS} {right}"
            row = {
                "doc_id": number,
                "target": WORDS,
                "arguments": {"gen_args_0": {"arg_0": f"{WORDS} {number}", "arg_1": {}}},
                "resps": [[answer]],
                "filtered_resps": [answer],
                "filter": "none",
                "metrics": ["exact_match"],
                **dict.fromkeys(("doc_hash", "prompt_hash", "target_hash"), f"{number}"),
                "exact_match": float(right),
            }
            line = json.dumps(row).encode() + b"\n"
            digest.update(line)
            file.write(line)
    manifest = {"schema": 1, "model": folder.name, "model_hash": hashlib.sha256(folder.name.encode()).hexdigest()}
    entry = {"file": path.name, "sha256": digest.hexdigest()}
    manifest |= {"settings": {}, "tasks": {"t": entry}}
    (folder / "k2quant_eval.json").write_text(json.dumps(manifest))
    return folder


def decided(folder: Path, items: int) -> tuple[int, int]:
    """Gate two runs and write the verdict, flip by flip; return the flips and the bytes at the peak."""
    sides = [written(folder / f"{flipped}", items, flipped) for flipped in (3, 7)]
    tracemalloc.start()
    try:
        verdict = gate(*sides)
        for _ in verdict.as_json():
            pass
        return len(verdict.flips), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_gate_holds_a_few_hundred_bytes_an_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both sides together, 600 flips of 2.4 kB each among them: 300,000 items stay far below 300 MB."""
    monkeypatch.setattr(comparing, "chance_of_pass", lambda *_: 1.0)  # planning holds nothing and takes long
    monkeypatch.setattr(comparing, "plan", lambda **_: SimpleNamespace(items=None))
    monkeypatch.setattr(reading, "_LIMIT", 2**16)  # of a manifest: so much is set aside for it, though never touched
    decided(tmp_path / "small", 300)  # what is loaded once
    _, little = decided(tmp_path / "little", 1_000)
    flips, much = decided(tmp_path / "much", ITEMS)
    assert flips == ITEMS // 5
    assert (much - little) / (ITEMS - 1_000) < 500
