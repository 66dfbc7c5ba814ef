"""`run_tools`: requests with tools put to a model, every answer kept, and what is right of each in items of a gate.

While it runs, the folder holds a lock, the request and a journal of answers, as for `run`; in the end the answers,
samples as lm-eval writes them, and the manifest that vouches for them, written last.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from k2quant.checkpoint.files.sources import no_folder
from k2quant.checkpoint.reader import open_checkpoint
from k2quant.errors import HarnessFault, MalformedResults, UsageError
from k2quant.eval.runs.folder import JOURNAL, MANIFEST, begin, finished, held
from k2quant.eval.runs.identity import digest, seed_of
from k2quant.eval.runs.journal import Journal
from k2quant.eval.tools.calling import Answer, read_answer
from k2quant.eval.tools.local import Checkpoint, check_requests
from k2quant.eval.tools.recording import Row, write
from k2quant.eval.tools.requests import BUILTIN, Asked, check_schemas, read_requests
from k2quant.eval.tools.schemas import Schemas, check_installed
from k2quant.eval.tools.scoring import RULE, WHOLE, checked, expectation_digest, expected_of
from k2quant.eval.tools.served import ask_server
from k2quant.eval.tools.settings import NEW_TOKENS, SEED, ToolsRequest, as_model, check
from k2quant.eval.tools.taking import Taken, take
from k2quant.ground.extras import need
from k2quant.ground.saying.meter import each
from k2quant.ground.saying.progress import Asked as Progressing
from k2quant.ground.saying.progress import Progress, barred, told
from k2quant.ground.units import counted
from k2quant.ground.version import __version__


class _Plan(NamedTuple):
    """What is asked of whom, with answers that are there already."""

    requests: tuple[Asked, ...]
    """Each once, with the sampling that counts."""
    repeats: int
    model: str
    model_hash: str | None
    tokenizer_hash: str | None
    taken: Taken | None
    """Answers of others; None where a model is asked."""


@barred("tools", each("answer", "answers"))
def run_tools(
    request: ToolsRequest,
    folder: Path,
    *,
    soft_lock: bool = False,
    reading: Progress | None = None,
    progress: Progressing = None,
    remark: Callable[[str], None] | None = None,
) -> Path:
    """Put requests with tools to a model and keep each answer; resume where an earlier call was stopped.

    Args:
        request: what to ask whom.
        folder: for the results; made if need be.
        soft_lock: where its file system has no locks, lock it by a file.
        reading: called with the bytes of the model that are read and all bytes.
        progress: called with the answers that are there and all answers; True for a bar.
        remark: called with what is worth knowing on the way.

    Returns:
        the manifest's path.

    Raises:
        MissingExtra: jsonschema, or what runs models, is not installed.
        UsageError: options that make no sense, or a file that is not there.
        CheckpointError: a line of the requests is none, a schema is of no use, or the model cannot answer them.
        EvaluationError: answers or the reference cannot be used, or the server gave no usable answer.
        OutputError: the folder holds something else, or another run.
    """
    check(request)
    need("eval", "asking for tool calls")
    check_installed()
    say = remark or (lambda _: None)
    if request.backend == "k2quant":  # before a terabyte is hashed
        if why := no_folder(request.model):
            raise UsageError(f"{request.model}: {why}")
        open_checkpoint(Path(request.model), follow_links=request.follow_links)
    taken = take(request.model) if request.backend == "answers" else None
    requests = _requests(request, taken, say)
    reference = _reference(request.reference, requests)
    if request.backend == "k2quant":
        check_requests(requests)
    if request.repeats > 1 and not any(one.sampling["temperature"] for one in requests):
        raise UsageError("greedy answers are the same each time: `repeats=` need a `temperature=`")
    with held(folder, soft_lock=soft_lock), Schemas() as schemas:
        check_schemas(requests, schemas.unusable)
        plan = _plan(request, requests, taken, reading)
        identity = _identity(request, plan, reference)
        if finished(folder, identity):
            say(f"{folder}: this run is already finished")
            return folder / MANIFEST
        begun = begin(folder, identity)
        answers = plan.taken.answers if plan.taken else _asked(request, plan, folder, reading, told(progress), say)
        own = {key: answer for (key, repeat), answer in answers.items() if repeat == 0}
        expected = _expected(plan, reference, own, say)
        rows = [
            Row(
                asked=one,
                repeat=repeat,
                answer=(answer := answers[one.digest, repeat]),
                checked=checked(one, answer, schemas.fault),
                expects=expected.get(one.digest),
            )
            for one in plan.requests
            for repeat in range(plan.repeats)
        ]
        return write(folder, identity, rows, expected, plan.repeats, begun, {"jsonschema": version("jsonschema")})


def _requests(request: ToolsRequest, taken: Taken | None, say: Callable[[str], None]) -> tuple[Asked, ...]:
    """Return what is asked, each once, with the sampling that counts."""
    if taken is not None and request.requests is None:
        return taken.requests[: request.limit]
    source = request.requests or BUILTIN
    read = read_requests(source)
    once = {one.digest: one for one in reversed(read)}
    requests = tuple(once[key] for key in dict.fromkeys(one.digest for one in read))
    if len(requests) < len(read):
        say(f"{source}: {len(read) - len(requests)} of {len(read)} requests stand there before; each counts once")
    requests = requests[: request.limit]
    if taken is None:
        return tuple(replace(one, sampling=_sampling(request, one)) for one in requests)
    there = {one.digest: one for one in taken.requests}
    _check_answered(requests, there, Path(request.model))
    return tuple(replace(one, sampling=there[one.digest].sampling) for one in requests)


def _sampling(request: ToolsRequest, one: Asked) -> dict[str, Any]:
    """Return how an answer is drawn: as the user says, else as the request does, else greedily.

    A request's own seed goes as it stands; any other becomes one for each request.
    """
    given = {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "max_tokens": request.max_new_tokens,
        "seed": None if request.seed is None else _seed(request.seed, one),
    }
    said = {key: value for key, value in given.items() if value is not None}
    return {"temperature": 0, "max_tokens": NEW_TOKENS, "seed": _seed(SEED, one), **one.sampling, **said}


def _seed(seed: int, one: Asked) -> int:
    """Return the seed of a request's first answer; each repeat counts on from it, and must still be one."""
    return seed_of(seed, one.digest) // 2


def _check_answered(requests: Iterable[Asked], there: Container[str], place: Path) -> None:
    """Refuse answers that lack some requests.

    Raises:
        MalformedResults: so it is.
    """
    requests = list(requests)
    if absent := [one.place for one in requests if one.digest not in there]:
        raise MalformedResults(
            f"has no answer to {len(absent):,} of {counted(len(requests), 'request')}",
            file=place,
            found=f"none to that of {absent[0]}",
            remedy="messages and tools must be the same, word for word",
        )


def _reference(path: Path | None, requests: tuple[Asked, ...]) -> dict[str, Answer] | None:
    """Return the answers that are right because a reference gave them."""
    if path is None:
        return None
    answers = take(path).first()
    _check_answered(requests, answers, path)
    return answers


def _plan(request: ToolsRequest, requests: tuple[Asked, ...], taken: Taken | None, reading: Progress | None) -> _Plan:
    from k2quant.eval.asking.models import describe

    if taken is None:
        model = describe(as_model(request), reading)
        return _Plan(requests, request.repeats, request.model, model.model_hash, model.tokenizer_hash, None)
    hashes = taken.model_hash, taken.tokenizer_hash
    if request.served_from is not None:
        model = describe(replace(as_model(request), model=str(request.served_from)), reading)
        hashes = model.model_hash, model.tokenizer_hash
    return _Plan(requests, taken.repeats, taken.model, *hashes, taken)


def _identity(request: ToolsRequest, plan: _Plan, reference: Mapping[str, Answer] | None) -> dict[str, Any]:
    """Return all that the answers and their scores depend on."""
    served = request.backend == "api"
    local = request.backend == "k2quant"
    drawn = [{key: value for key, value in one.sampling.items() if key != "seed"} for one in plan.requests]
    asked = {
        "output_type": "tool_calls",
        "rule": RULE,
        "requests": digest([one.digest for one in plan.requests]),
        "sampling": drawn[0] if all(each == drawn[0] for each in drawn) else digest(drawn),
    }
    engine = ("torch", "transformers") if local else ()
    taken = plan.taken and digest([[*key, answer.as_dict()] for key, answer in sorted(plan.taken.answers.items())])
    return {
        "k2quant": __version__,
        "model": plan.model,
        "model_hash": plan.model_hash,
        "tokenizer_hash": plan.tokenizer_hash,
        "settings": {
            "backend": request.backend,
            "requests": request.requests or (BUILTIN if plan.taken is None else None),
            "reference": str(request.reference) if request.reference else None,
            "seeds": digest([one.sampling.get("seed") for one in plan.requests]),
            "repeats": plan.repeats,
            "device": request.device if local else None,
            "dtype": request.dtype if local else None,
            **{name: version(name) for name in engine},
            "base_url": request.base_url if served else None,
            "answers": taken,
            "expected": _known(plan, reference),
        },
        "tasks": {WHOLE: asked},
    }


def _known(plan: _Plan, reference: Mapping[str, Answer] | None) -> str | None:
    """Return the digest of what is expected, where that is known before the model answers."""
    if reference is None and plan.requests[0].expects is None:
        return None
    return expectation_digest(expected_of(plan.requests, reference))


def _expected(
    plan: _Plan, reference: Mapping[str, Answer] | None, own: Mapping[str, Answer], say: Callable[[str], None]
) -> dict[str, tuple[str, ...]]:
    """Return what is right of each request: as the reference did, as the request says, or as this very run did.

    Raises:
        HarnessFault: that is known of none.
    """
    if reference is None and plan.requests[0].expects is None:
        reference = own
        drawn = any(one.sampling.get("temperature") for one in plan.requests)
        again = (
            "; its answers are drawn: for a baseline, run it once more with this run as `reference=`" if drawn else ""
        )
        say(f"nothing says what is right, so this run's first answers do; the next takes it as `reference=`{again}")
    expected = expected_of(plan.requests, reference)
    if not expected:
        raise HarnessFault(
            "nobody knows what is right of any request", found="a reference whose answers were all cut, or are none"
        )
    return expected


def _asked(
    request: ToolsRequest,
    plan: _Plan,
    folder: Path,
    reading: Progress | None,
    progress: Progress | None,
    say: Callable[[str], None],
) -> dict[tuple[str, int], Answer]:
    """Return all answers, those of an earlier call from its journal."""
    journal = Journal(folder / JOURNAL)
    answers: dict[tuple[str, int], Answer] = {}
    missing: list[tuple[Asked, int]] = []
    for one in plan.requests:
        for repeat in range(plan.repeats):
            kept = _kept(journal, f"{one.digest} {repeat}")
            if kept:
                answers[one.digest, repeat] = kept
            else:
                missing.append((one, repeat))
    if answers:
        say(f"{folder}: resumes after {counted(len(answers), 'answer')}")
    total = len(answers) + len(missing)

    def came(place: int, answer: Answer) -> None:
        one, repeat = missing[place]
        journal.add(f"{one.digest} {repeat}", [answer.as_dict()])
        answers[one.digest, repeat] = answer
        if progress:
            progress(len(answers), total)

    if missing and request.backend == "api":
        ask_server(as_model(request), missing, came, say)
    elif missing:
        local = Checkpoint(
            Path(request.model),
            device=request.device,
            dtype=request.dtype,
            trust_remote_code=request.trust_remote_code,
            follow_links=request.follow_links,
            progress=reading,
        )
        for place, (one, repeat) in enumerate(missing):
            came(place, local.answer(one, one.sampling, one.sampling["seed"] + repeat))
    return answers


def _kept(journal: Journal, key: str) -> Answer | None:
    """Return the answer that a journal has; None for what is none, which is asked again."""
    try:
        return read_answer((journal.get(key) or [None])[0])
    except ValueError:
        return None
