"""Runs as they lie on the disk: ours, and those that lm-eval's own command wrote. No file of them is believed."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from k2quant.checkpoint.files.paths import check_inside, inside, read_limited
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.errors import CheckpointError, MalformedResults
from k2quant.eval.runs.folder import MANIFEST, SCHEMA
from k2quant.eval.runs.items import Run, Task
from k2quant.eval.runs.samples import read_samples

_LIMIT = 2**28  # bytes of a results file; lm-eval writes the whole environment into it
_TIME = r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(?:\.\d+)?"
_RESULTS = re.compile(rf"results_(?P<time>{_TIME})\.json")
_SAMPLES = re.compile(rf"samples_(?P<task>.+)_(?P<time>{_TIME})\.jsonl")
_NO_SETTING = {
    *("file", "sha256", "rows", "documents", "truncated", "cut_in_thought", "seconds", "metrics"),
    "repeats",  # the gate compares shares, and those of more answers are only less noisy
}
"""What the manifest says of a task that two runs need not share."""


def read_run(path: str | os.PathLike[str]) -> Run:
    """Read a run.

    Args:
        path: what `k2quant eval run -o` wrote; or the output folder of `lm_eval --log_samples`, or one of its
            `results_*.json` where it holds several.

    Raises:
        MalformedResults: there is no run, it is not finished, or its files are truncated, mixed up or lie.
    """
    place = Path(path)
    try:
        if (place / MANIFEST).is_file():
            return _ours(place)
        return _plain(_results_file(place))
    except OSError as error:
        raise MalformedResults("cannot be read", file=error.filename or place, found=error.strerror) from error
    except CheckpointError as error:  # the readers of JSON and of paths blame checkpoints
        raise MalformedResults(str(error)) from error


def _ours(folder: Path) -> Run:
    manifest = parse_object(read_limited(folder / MANIFEST, _LIMIT), file=folder / MANIFEST)
    if manifest.get("schema") != SCHEMA:
        raise MalformedResults(
            "of another version of k2quant",
            file=folder / MANIFEST,
            expected=SCHEMA,
            found=f"{manifest.get('schema')!r:.100}",
        )
    entries = _object(manifest, "tasks", folder / MANIFEST)
    results = _summary(folder / "results.json")
    if not entries:
        raise MalformedResults("names no task", file=folder / MANIFEST)
    _check_parts(entries, folder / MANIFEST)
    return Run(
        folder=folder,
        model=str(manifest.get("model", "")),
        model_hash=_hash(manifest, "model_hash", folder / MANIFEST),
        tokenizer_hash=_hash(manifest, "tokenizer_hash", folder / MANIFEST),
        settings=_object(manifest, "settings", folder / MANIFEST),
        groups=_groups(results),
        tasks={name: _our_task(folder, name, _object(entries, name, folder / MANIFEST), results) for name in entries},
    )


def _check_parts(entries: Mapping[str, Any], file: Path) -> None:
    """Refuse a part of a task that is none: parts are left out of the pool for the whole that has their answers.

    Raises:
        MalformedResults: see above.
    """
    wholes = {name: entry.get("part_of") for name, entry in entries.items() if isinstance(entry, dict)}
    for name, whole in wholes.items():
        if whole is not None and not (isinstance(whole, str) and whole in wholes and wholes[whole] is None):
            raise MalformedResults(
                f"task {name:.100} is a part of no whole task", file=file, found=f"part_of {whole!r:.100}"
            )


def _summary(path: Path) -> dict[str, Any]:
    """Return lm-eval's summary; nothing where it holds an infinite perplexity, which is no JSON, or is not there."""
    try:
        return parse_object(read_limited(path, _LIMIT), file=path)
    except (CheckpointError, FileNotFoundError):
        return {}


def _our_task(folder: Path, name: str, entry: Mapping[str, Any], results: Mapping[str, Any]) -> Task:
    path = inside(folder, str(entry.get("file", "")))
    samples = read_samples(path)
    if samples.digest != entry.get("sha256"):
        raise MalformedResults(
            "changed since the run wrote it", file=path, remedy="run the evaluation again into an empty folder"
        )
    _check_direction(name, samples.metric, results, folder / "results.json")
    if (said := entry.get("repeats", 1)) != (found := samples.items.columns.repeats):
        raise MalformedResults(
            "not asked as often as the run says", file=path, expected=f"{said!r:.100} answers to each", found=found
        )
    settings = {key: value for key, value in entry.items() if key not in _NO_SETTING}
    return Task(
        name=name,
        metric=samples.metric,
        filter=samples.filter,
        items=samples.items,
        settings=settings,
        truncated=truncated if type(truncated := entry.get("truncated")) is int else None,
    )


def _results_file(place: Path) -> Path:
    """Return the results file that a path means, looking one folder deep, where lm-eval puts the model's name."""
    if place.is_file():
        if not _RESULTS.fullmatch(place.name):
            raise MalformedResults("no results file of lm-eval", file=place, expected="results_<time>.json")
        return place
    if not place.is_dir():
        raise MalformedResults("not there", file=place, expected="the folder of a run")
    found = sorted(file for pattern in ("*", "*/*") for file in place.glob(pattern) if _RESULTS.fullmatch(file.name))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(str(file.relative_to(place)) for file in found[:3])
        raise MalformedResults(f"holds {len(found)} runs", file=place, found=names, remedy="name one of these files")
    remedy = "run the same k2quant eval run again: it resumes" if any(place.glob("k2quant_eval*")) else None
    raise MalformedResults(
        "holds no finished run", file=place, expected=f"{MANIFEST}, or lm-eval's results_*.json", remedy=remedy
    )


def _plain(path: Path) -> Run:
    results = parse_object(read_limited(path, _LIMIT), file=path)
    match = _RESULTS.fullmatch(path.name)
    time = match["time"] if match else ""
    named = {file: _SAMPLES.fullmatch(file.name) for file in path.parent.iterdir()}
    files = {name["task"]: file for file, name in named.items() if name and name["time"] == time}
    counts = _object(results, "n-samples", path)
    if not counts:
        raise MalformedResults("names no task", file=path, remedy="run the evaluation again")
    if not files:
        raise MalformedResults(
            "has no samples beside it",
            file=path,
            expected=f"samples_<task>_{time}.jsonl",
            remedy="lm_eval --log_samples",
        )
    if missing := sorted(set(counts) - set(files)):
        raise MalformedResults("has no samples of some tasks", file=path, found=", ".join(missing)[:200])
    config = _object(results, "config", path)
    return Run(
        folder=path.parent,
        model=str(results.get("model_name") or config.get("model") or ""),
        model_hash=None,
        tokenizer_hash=None,
        settings={key: config.get(key) for key in ("model", "model_args", "batch_size", "device")}
        | {"lm_eval": results.get("lm_eval_version")},
        groups=_groups(results),
        tasks={name: _plain_task(files[name], name, results, path) for name in sorted(files) if name in counts},
    )


def _groups(results: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return the parts of lm-eval's groups; what is no list of names is no group."""
    found = results.get("group_subtasks")
    groups = found.items() if isinstance(found, dict) else ()
    return {
        name: tuple(parts)
        for name, parts in groups
        if isinstance(parts, list) and parts and all(isinstance(part, str) for part in parts)
    }


def _plain_task(file: Path, name: str, results: Mapping[str, Any], path: Path) -> Task:
    check_inside(file.parent, file)
    samples = read_samples(file)
    _check_direction(name, samples.metric, results, path)
    said = _object(results["n-samples"], name, path).get("effective")
    if said != (found := samples.items.columns.items):
        raise MalformedResults(f"not the samples of {path.name}", file=file, expected=f"{said} documents", found=found)
    return Task(
        name=name,
        metric=samples.metric,
        filter=samples.filter,
        items=samples.items,
        settings=_plain_settings(name, results),
    )


def _check_direction(name: str, metric: str, results: Mapping[str, Any], path: Path) -> None:
    """Refuse a metric of which lm-eval says that less is better, such as `pct_stereotype`: 1 is not right there.

    Raises:
        MalformedResults: see above.
    """
    directions = results.get("higher_is_better")
    of_task = directions.get(name) if isinstance(directions, dict) else None
    if isinstance(of_task, dict) and of_task.get(metric) is False:
        raise MalformedResults(
            f"less {metric} is better in task {name}, so 1 does not mean right",
            file=path,
            remedy="gate tasks whose answers are right or wrong (`tasks=`)",
        )


def _plain_settings(name: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return what lm-eval notes of how a task was asked."""
    of_tasks = {"version": "versions", "shots": "n-shot"}
    settings = {key: part.get(name) for key, there in of_tasks.items() if isinstance(part := results.get(there), dict)}
    config = results.get("configs", {})
    task = config.get(name, {}) if isinstance(config, dict) else {}
    if isinstance(task, dict):
        settings |= {key: task.get(key) for key in ("output_type", "generation_kwargs", "filter_list") if key in task}
    for key in ("chat_template_sha", "system_instruction_sha", "fewshot_as_multiturn"):
        settings[key] = results.get(key)
    gen_kwargs = results["config"].get("gen_kwargs") if isinstance(results.get("config"), dict) else None
    return settings | {"gen_kwargs": gen_kwargs}


def _object(parent: Mapping[str, Any], key: str, file: Path) -> dict[str, Any]:
    value = parent.get(key)
    if not isinstance(value, dict):
        raise MalformedResults(f"{key!r:.100} is no object", file=file, found=f"{value!r:.100}")
    return value


def _hash(parent: Mapping[str, Any], key: str, file: Path) -> str | None:
    value = parent.get(key)
    if value is not None and not (isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value)):
        raise MalformedResults(f"{key} is no SHA-256", file=file, found=f"{value!r:.100}")
    return value
