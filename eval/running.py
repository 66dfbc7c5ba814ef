"""`run`: lm-eval's benchmarks on one model, every answer kept with hashes of all that it depends on.

While it runs, the folder holds a lock, the request and a journal of finished chunks; in the end, lm-eval's own files
(`samples_<task>.jsonl`, `results.json`) and the manifest that vouches for them, `k2quant_eval.json`, written last.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from k2quant.checkpoint.paths import PARTIAL, locked_file, read_limited, write_whole
from k2quant.checkpoint.strict_json import parse_object
from k2quant.errors import DestinationForeign, DestinationStale, MalformedFile, MissingExtra, UsageError
from k2quant.eval.identity import digest
from k2quant.eval.journal import Journal, Progress, Resuming
from k2quant.eval.presets import expand
from k2quant.units import one_of
from k2quant.version import __version__

if TYPE_CHECKING:
    from k2quant.eval.harness import Tasks
    from k2quant.eval.models import Model

Backend = Literal["k2quant", "hf", "vllm", "api"]
BACKENDS: tuple[Backend, ...] = ("k2quant", "hf", "vllm", "api")

MANIFEST = "k2quant_eval.json"
"""Name of the file that says what a finished run is; a folder without it is not finished."""
REQUEST = "k2quant_eval_request.json"
JOURNAL = "k2quant_eval_journal.jsonl"
LOCK = "k2quant_eval_lock"
RESULTS = "results.json"
SCHEMA = 1

_LIMIT = 2**28  # bytes of a manifest or request
_PASSING = (LOCK, JOURNAL, REQUEST, REQUEST + PARTIAL, RESULTS + PARTIAL, MANIFEST + PARTIAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be asked of which model, and how."""

    model: str
    """Folder of a checkpoint; for `hf` and `vllm` also a name on the hub; for `api` what the server calls it."""
    tasks: tuple[str, ...]
    """Tasks, groups or tags of lm-eval, or presets of ours."""
    backend: Backend = "k2quant"
    """`k2quant` for packed weights on our kernels, `hf` for transformers' own loading, `vllm`, or `api` for a server."""
    limit: int | None = None
    """How many documents of each task; None for all."""
    shots: int | None = None
    """Examples before each question; None for each task's own number."""
    batch_size: int = 8
    """Texts that the model is given at once; for `api`, requests under way at the same time."""
    max_new_tokens: int | None = None
    """The most tokens of an answer; None for each task's own number, or 1,024."""
    max_length: int | None = None
    """The most tokens of prompt and answer; None for what the model's config allows."""
    device: str = "cpu"
    """As torch calls it; `auto` to spread the model."""
    dtype: str = "bfloat16"
    """Of activations and of what is not quantised."""
    include: tuple[Path, ...] = ()
    """Folders with task YAML of your own."""
    data: Mapping[str, Path] = field(default_factory=dict)
    """By task or group, local files instead of the hub's."""
    base_url: str | None = None
    """Of a server, such as `http://localhost:8000/v1`."""
    chat: bool = False
    """Whether a server is asked by chat messages."""
    tokenizer: Path | None = None
    """Of a served model, for tasks that score text; None for that of `served_from`."""
    served_from: Path | None = None
    """The checkpoint that a server serves, so that the run has a model hash."""
    chat_template: bool = False
    """Whether prompts go through the tokenizer's chat template."""
    trust_remote_code: bool = False
    """Whether the checkpoint's own tokenizer code may run."""
    unsafe_code: bool = False
    """Whether tasks may run the code that the model writes."""


def run(
    request: Request,
    folder: Path,
    *,
    hashing: Progress | None = None,
    progress: Progress | None = None,
    remark: Callable[[str], None] | None = None,
) -> Path:
    """Ask a model all questions of some tasks and keep each answer; resume where an earlier call was stopped.

    Args:
        request: what to ask whom.
        folder: for the results; made if need be.
        hashing: called with the bytes of the model that are hashed and all bytes.
        progress: called with the requests that are answered and all requests.
        remark: called with what is worth knowing on the way.

    Returns:
        the manifest's path.

    Raises:
        MissingExtra: lm-eval is not installed.
        UsageError: there is no such task, or options do not go together.
        EvaluationError: the evaluation broke; the message says over what.
        OutputError: the folder holds something else, or another run.
    """
    _check(request)
    harness = _harness()
    harness.quiet()
    with _held(folder):
        tasks = harness.load_tasks(
            expand(request.tasks),
            include=request.include,
            data=request.data,
            shots=request.shots,
            limit=request.limit,
            new_tokens=request.max_new_tokens,
        )
        from k2quant.eval.models import describe, load

        model = describe(request, hashing)
        identity = _identity(request, model, tasks)
        if _finished(folder, identity):
            if remark:
                remark(f"{folder}: this run is already finished")
            return folder / MANIFEST
        begun = _begin(folder, identity)
        journal = Journal(folder / JOURNAL)
        if remark and len(journal):
            remark(f"{folder}: resumes after {len(journal)} chunks")
        lm = Resuming(load(model, request, tasks), journal, batch_size=request.batch_size, progress=progress)
        lm.expect(_count(tasks))
        results = harness.ask(
            lm, tasks, chat_template=request.chat_template or request.chat, unsafe_code=request.unsafe_code
        )
        return _write(folder, identity, tasks, results, lm.cut, begun, lm.settings)


def _check(request: Request) -> None:
    one_of("backend", request.backend, BACKENDS)
    for name in ("limit", "batch_size", "max_new_tokens", "max_length"):
        value = getattr(request, name)
        if value is not None and (type(value) is not int or value < 1):
            raise UsageError(f"{name}: expected at least 1, found {value!r}")
    if not request.tasks:
        raise UsageError("no tasks were named")
    served = {"base_url": request.base_url, "tokenizer": request.tokenizer, "served_from": request.served_from}
    if request.backend == "api":
        if not request.base_url:
            raise UsageError("the api backend needs the server's URL, such as --base-url http://localhost:8000/v1")
        if request.chat_template:
            raise UsageError("a server applies its own chat template; ask for it with --chat")
    elif request.chat or any(served.values()):
        raise UsageError("a server's options (--base-url, --chat, --tokenizer, --served-from) go with --backend api")


def _harness() -> Any:
    """Import what imports lm-eval.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        from k2quant.eval import harness
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in {"lm_eval", "datasets"}:
            raise
        raise MissingExtra("lm-eval is not installed", remedy='pip install "k2quant[eval]"') from error
    return harness


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Make the folder and keep others out of it while the block runs."""
    if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
        raise DestinationForeign("not a folder", file=folder, remedy="name another one")
    if folder.is_dir() and not any((folder / name).exists() for name in (MANIFEST, REQUEST, LOCK)):
        foreign = sorted(path.name for path in folder.iterdir())
        if foreign:
            found = ", ".join(foreign[:5])
            raise DestinationForeign("not empty, and no run of k2quant", file=folder, found=found)
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / LOCK
    with locked_file(lock):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _identity(request: Request, model: Model, tasks: Tasks) -> dict[str, Any]:
    """Return all that the answers depend on; two requests with one identity have the same answers."""
    import torch
    import transformers

    from k2quant.eval.harness import VERSION

    return {
        "k2quant": __version__,
        "model": request.model,
        "model_hash": model.model_hash,
        "tokenizer_hash": model.tokenizer_hash,
        "settings": {
            "backend": request.backend,
            "batch_size": request.batch_size,
            "device": None if request.backend == "api" else request.device,
            "dtype": None if request.backend == "api" else request.dtype,
            "max_length": model.max_length,
            "max_new_tokens": request.max_new_tokens,
            "limit": request.limit,
            "shots": request.shots,
            "chat": request.chat,
            "chat_template": request.chat_template,
            "base_url": request.base_url,
            "unsafe_code": request.unsafe_code,
            "lm_eval": VERSION,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "tasks": {name: _task_identity(tasks, name) for name in sorted(tasks.by_name)},
    }


def _task_identity(tasks: Tasks, name: str) -> dict[str, Any]:
    from k2quant.eval.identity import task_hash

    config, docs = tasks.config(name), tasks.docs(name)
    return {
        "documents": len(docs),
        "version": tasks.by_name[name].VERSION,
        "shots": config.get("num_fewshot", 0),
        "output_type": config.get("output_type"),
        "generation": config.get("generation_kwargs") if config.get("output_type") == "generate_until" else None,
        "task_hash": task_hash(config, docs),
    }


def _finished(folder: Path, identity: Mapping[str, Any]) -> bool:
    """Tell whether the folder holds this very run, finished.

    Raises:
        DestinationStale: it holds another one.
    """
    path = folder / MANIFEST
    if not path.exists():
        return False
    try:
        found = parse_object(read_limited(path, _LIMIT), file=path).get("identity")
    except MalformedFile:
        found = None
    if found != digest(identity):
        raise DestinationStale(
            "the folder holds another finished run", file=folder, remedy="name another folder, or delete this one"
        )
    return True


def _begin(folder: Path, identity: Mapping[str, Any]) -> float:
    """Note what is being asked, or check that it is the same as before; return when it was begun, in seconds."""
    path = folder / REQUEST
    if path.exists():
        try:
            noted = parse_object(read_limited(path, _LIMIT), file=path)
        except MalformedFile:
            noted = {}
        if noted.get("identity") != digest(identity):
            raise DestinationStale(
                "an unfinished run of other options, another model or other data",
                file=folder,
                found=_difference(noted.get("asks"), identity),
                remedy="name another folder, or delete this one",
            )
        return float(noted.get("begun", time.time()))
    begun = time.time()
    write_whole(path, _dump({"schema": SCHEMA, "identity": digest(identity), "begun": begun, "asks": identity}))
    return begun


def _difference(before: Any, now: Mapping[str, Any]) -> str | None:
    """Return the names of what differs, or None where nobody knows."""
    if not isinstance(before, Mapping):
        return None
    plain = json.loads(_dump(now))
    changed = [key for key in plain if key not in {"settings", "tasks"} and before.get(key) != plain[key]]
    for part in ("settings", "tasks"):
        old = before.get(part)
        old = old if isinstance(old, Mapping) else {}
        keys = sorted(old.keys() | plain[part].keys())
        changed += [key for key in keys if old.get(key) != plain[part].get(key)]
    return f"other {', '.join(changed[:5])}" if changed else None


def _count(tasks: Tasks) -> int:
    """Return about how many requests there will be: lm-eval builds them later."""
    total = 0
    for name in tasks.by_name:
        docs = tasks.docs(name)
        task = tasks.by_name[name]
        choices = task.doc_to_choice(docs[0]) if task.OUTPUT_TYPE == "multiple_choice" and docs else None
        total += len(docs) * (len(choices) if choices else 1)
    return total


def _write(
    folder: Path,
    identity: dict[str, Any],
    tasks: Tasks,
    results: dict[str, Any],
    cut: Counter[str],
    begun: float,
    settings: Mapping[str, Any],
) -> Path:
    """Write samples, results and manifest, in this order, and take away what only an unfinished run needs."""
    from k2quant.eval.harness import VERSION, plain

    samples = results.pop("samples")
    shown = {name: _write_task(folder, name, rows) for name, rows in samples.items()}
    ended = time.time()
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
        entry["truncated"] = cut[name] if tasks.by_name[name].OUTPUT_TYPE == "generate_until" else None
    manifest = {
        "schema": SCHEMA,
        "identity": digest(identity),
        **{key: identity[key] for key in ("k2quant", "model", "model_hash", "tokenizer_hash")},
        "settings": {**identity["settings"], **settings},
        "tasks": shown,
        "groups": {name: _metrics(group) for name, group in results.get("groups", {}).items()},
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(ended)),
        "seconds": round(ended - begun, 3),
    }
    write_whole(folder / MANIFEST, _dump(manifest))
    for name in (JOURNAL, REQUEST):
        (folder / name).unlink(missing_ok=True)
    return folder / MANIFEST


def _write_task(folder: Path, name: str, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Write a task's samples as lm-eval does, each with the hash of all its requests."""
    from k2quant.eval.harness import as_written, plain

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


def _dump(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False, default=str).encode() + b"\n"
