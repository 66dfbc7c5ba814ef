"""`run`: lm-eval's benchmarks on one model, every answer kept with hashes of all that it depends on.

While it runs, the folder holds a lock, the request and a journal of finished chunks; in the end, lm-eval's own files
(`samples_<task>.jsonl`, `results.json`) and the manifest that vouches for them, `k2quant_eval.json`, written last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2quant.checkpoint.files.sources import no_folder
from k2quant.checkpoint.reader import open_checkpoint
from k2quant.errors import MissingExtra, UsageError
from k2quant.eval.asking.engines import answers_depend_on
from k2quant.eval.asking.presets import expand
from k2quant.eval.asking.recording import write
from k2quant.eval.asking.request import Request, check
from k2quant.eval.asking.sampling import check_sampling, generation
from k2quant.eval.asking.thinking import Thinking, decide
from k2quant.eval.asking.thoughts import Thoughts, Unstopped
from k2quant.eval.runs.folder import JOURNAL, MANIFEST, begin, finished, held
from k2quant.eval.runs.identity import digest, task_hash
from k2quant.eval.runs.journal import Journal
from k2quant.eval.runs.resuming import Progress, Resuming
from k2quant.ground.extras import install, need
from k2quant.ground.saying.faults import said
from k2quant.ground.saying.meter import each
from k2quant.ground.saying.progress import Asked, barred, told
from k2quant.ground.units import counted
from k2quant.ground.version import __version__

if TYPE_CHECKING:
    from k2quant.eval.asking.harness import Tasks
    from k2quant.eval.asking.models import Model

_ROOM = 8192  # tokens; K2's own benchmarks of models that reason allow 96k and more


@barred("run", each("request", "requests"))
def run(
    request: Request,
    folder: Path,
    *,
    soft_lock: bool = False,
    reading: Progress | None = None,
    progress: Asked = None,
    remark: Callable[[str], None] | None = None,
) -> Path:
    """Ask a model all questions of some tasks and keep each answer; resume where an earlier call was stopped.

    Args:
        request: what to ask whom.
        folder: for the results; made if need be.
        soft_lock: where its file system has no locks, lock it by a file.
        reading: called with the bytes of the model that are read and all bytes, first to hash, then to load them.
        progress: called with the requests that are answered and all requests; True for a bar.
        remark: called with what is worth knowing on the way.

    Returns:
        the manifest's path.

    Raises:
        MissingExtra: lm-eval is not installed.
        UsageError: there is no such task, or options do not go together.
        EvaluationError: the evaluation broke; the message says over what.
        OutputError: the folder holds something else, or another run.
    """
    check(request)
    check_sampling(request)
    if request.backend == "k2quant":  # before lm-eval is loaded, which takes seconds, and data are fetched
        if why := no_folder(request.model):
            raise UsageError(f"{request.model}: {why}")
        open_checkpoint(Path(request.model), follow_links=request.follow_links)
    harness = _harness()
    harness.quiet()
    with held(folder, soft_lock=soft_lock):
        tasks = harness.load_tasks(
            expand(request.tasks),
            include=request.include,
            data=request.data,
            shots=request.shots,
            limit=request.limit,
            new_tokens=request.max_new_tokens,
            sampling=generation(request),
            unsafe_code=request.unsafe_code,
        )
        from k2quant.eval.asking.models import describe, load

        model = describe(request, reading)
        thinking = decide(request, model.folder or request.tokenizer, tasks.answered)
        identity = _identity(request, model, tasks, thinking)
        if finished(folder, identity):
            if remark:
                remark(f"{folder}: this run is already finished")
            return folder / MANIFEST
        begun = begin(folder, identity)
        journal = Journal(folder / JOURNAL)
        if remark:
            for sentence in _remarks(request, thinking, tasks):
                remark(sentence)
            if len(journal):
                remark(f"{folder}: resumes after {counted(len(journal), 'chunk')}")
        thoughts = Thoughts(thinking) if thinking else None
        lm = Resuming(
            _waiting(load(model, request, tasks, reading, remark), thinking),
            journal,
            batch_size=request.batch_size,
            repeats=request.repeats,
            seed=request.seed,
            reader=thoughts,
            progress=told(progress),
        )
        lm.expect(_count(tasks, request.repeats))
        results = harness.ask(
            lm,
            tasks,
            chat_template=request.chat_template or request.chat,
            unsafe_code=request.unsafe_code,
            repeats=request.repeats,
            thoughts=thoughts,
        )
        return write(folder, identity, results, lm.cut, begun, lm.settings, repeats=request.repeats, thoughts=thoughts)


def _remarks(request: Request, thinking: Thinking | None, tasks: Tasks) -> Iterator[str]:
    """Yield what is worth knowing before a model that reasons is asked."""
    if thinking is None or (thinking.spares and not thinking.always):  # nobody knows whether it reasons
        return
    if not thinking.always:
        through = "chat=True" if request.backend == "api" else "chat_template=True"
        yield f"a model that reasons, but prompts do not go through its chat template (`{through}`): it may not"
        return
    if scored := tasks.scored:
        yield f"{', '.join(scored)}: text is scored as it stands, so this model does not reason there"
    limits = [
        limit
        for name in tasks.by_name
        if name not in scored and (limit := tasks.config(name).get("generation_kwargs", {}).get("max_gen_toks"))
    ]
    if limits and min(limits) < _ROOM:
        yield f"answers may have {min(limits):,} tokens, reasoning included; give them room by `max_new_tokens=`"
    if limits and not request.temperature:
        yield "greedily, a model that reasons may loop to the limit; K2-Thinking's card asks for `temperature=1.0`"


def _waiting(lm: Any, thinking: Thinking | None) -> Any:
    """Have a model stop at stop strings behind its reasoning only."""
    if thinking is None:
        return lm
    if hasattr(lm, "thinking"):  # it waits for the marker itself
        lm.thinking = thinking
        return lm
    return Unstopped(lm, thinking)


def _harness() -> Any:
    """Import what imports lm-eval.

    Raises:
        MissingExtra: it is not installed.
    """
    need("eval", "asking a benchmark's questions")
    try:
        from k2quant.eval.asking import harness
    except (ImportError, NameError) as error:  # lm-eval without its extra `api` ends in a NameError
        if (getattr(error, "name", None) or "").startswith("k2quant"):
            raise
        remedy = install("eval")
        raise MissingExtra("lm-eval is not whole", found=said(error), remedy=remedy) from error
    return harness


def _identity(request: Request, model: Model, tasks: Tasks, thinking: Thinking | None) -> dict[str, Any]:
    """Return all that the answers depend on; two requests with one identity have the same answers."""
    import torch
    import transformers

    from k2quant.eval.asking.harness import VERSION

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
            "model_args": answers_depend_on(request.backend, request.model_args),
            "chat": request.chat,
            "chat_template": request.chat_template,
            "base_url": request.base_url,
            "unsafe_code": request.unsafe_code,
            "think_end": thinking.end if thinking else None,
            "think_always": thinking.always if thinking else None,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed,
            "repeats": request.repeats,
            "lm_eval": VERSION,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "tasks": {name: _task_identity(tasks, name) for name in sorted(tasks.by_name)},
    }


def _task_identity(tasks: Tasks, name: str) -> dict[str, Any]:
    config, docs = tasks.config(name), tasks.docs(name)
    return {
        "documents": len(docs),
        "version": tasks.by_name[name].VERSION,
        "shots": config.get("num_fewshot", 0),
        "output_type": config.get("output_type"),
        "generation": config.get("generation_kwargs") if config.get("output_type") == "generate_until" else None,
        "task_hash": task_hash(config, docs),
        "examples_hash": digest(tasks.examples(name)) if config.get("num_fewshot") else None,
    }


def _count(tasks: Tasks, repeats: int) -> int:
    """Return about how many requests there will be: lm-eval builds them later."""
    total = 0
    for name in tasks.by_name:
        docs = tasks.docs(name)
        task = tasks.by_name[name]
        choices = task.doc_to_choice(docs[0]) if task.OUTPUT_TYPE == "multiple_choice" and docs else None
        asked = repeats if task.OUTPUT_TYPE == "generate_until" else 1
        total += len(docs) * (len(choices) if choices else asked)
    return total
