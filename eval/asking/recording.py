"""What a finished run leaves: lm-eval's own files, and the manifest that vouches for them, written last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from k2quant.checkpoint.files.paths import write_whole
from k2quant.eval.asking.thoughts import Thoughts
from k2quant.eval.runs.folder import RESULTS, seal
from k2quant.eval.runs.identity import digest


def write(
    folder: Path,
    identity: dict[str, Any],
    results: dict[str, Any],
    cut: Mapping[str, int | None],
    begun: float,
    settings: Mapping[str, Any],
    *,
    repeats: int = 1,
    thoughts: Thoughts | None = None,
) -> Path:
    """Write samples, results and manifest, in this order, and take away what only an unfinished run needs.

    Args:
        folder: of the run.
        identity: all that the answers depend on.
        results: of lm-eval, samples included.
        cut: by task whose answers are written, how many were cut at the limit on new tokens; None: not known.
        begun: when, in seconds of the epoch.
        settings: what was found out about the model while it was loaded.
        repeats: how often each question was asked whose answer is written.
        thoughts: what became of the reasoning; None where nobody looked for any.

    Returns:
        the manifest's path.
    """
    from k2quant.eval.asking.harness import VERSION, plain

    samples = results.pop("samples")
    shown = {name: _write_task(folder, name, rows) for name, rows in samples.items()}
    full = {
        **results,
        "config": {"model": identity["model"], **identity["settings"], **settings},
        "date": begun,
        "lm_eval_version": VERSION,
        "transformers_version": identity["settings"]["transformers"],
        "task_hashes": {name: entry.pop("lm_eval_hash") for name, entry in shown.items()},
    }
    write_whole(folder / RESULTS, json.dumps(full, indent=2, default=plain, ensure_ascii=False).encode())
    for name, entry in shown.items():
        entry.update(identity["tasks"][name])
        entry["metrics"] = _metrics(results["results"][name])
        entry["truncated"] = cut.get(name)
        if repeats > 1 and entry["output_type"] == "generate_until":
            entry["repeats"] = repeats
        if thoughts and thoughts.rows[name]:
            entry["think_end"], entry["cut_in_thought"] = thoughts.thinking.end, thoughts.cut[name]
    groups = {name: _metrics(group) for name, group in results.get("groups", {}).items()}
    return seal(folder, identity, settings, begun, {"tasks": shown, "groups": groups})


def _write_task(folder: Path, name: str, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Write a task's samples as lm-eval does, each with the hash of all its requests."""
    from k2quant.eval.asking.harness import as_written, plain

    lines = []
    for sample in samples:
        row = {**as_written(sample), "request_hash": digest(sample["arguments"])}
        lines.append(json.dumps(row, default=plain, ensure_ascii=False).encode() + b"\n")
    file = f"samples_{_file_name(name)}.jsonl"
    data = b"".join(lines)
    write_whole(folder / file, data)
    together = "".join(sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"] for sample in samples)
    return {
        "file": file,
        "sha256": hashlib.sha256(data).hexdigest(),
        "rows": len(samples),
        "lm_eval_hash": hashlib.sha256(together.encode()).hexdigest(),
    }


def _file_name(task: str) -> str:
    return "".join(character if character.isalnum() or character in "-_.:" else "_" for character in task)


def _metrics(results: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Return a task's scores and standard errors by `metric,filter`."""
    found: dict[str, dict[str, float | None]] = {}
    for key, value in results.items():
        metric, comma, behind = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            error = results.get(f"{metric}_stderr,{behind}")
            found[key] = {"value": _number(value), "stderr": _number(error)}
    return found


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):  # lm-eval's "N/A"
        return None
    return number if abs(number) < float("inf") else None
