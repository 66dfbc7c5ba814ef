"""lm-eval, the one file that imports it: its task definitions, its models and its scoring, none of them rewritten.

What is changed, and why: log lines are kept off the screen; local data are read without the cache of `datasets`; the
default limit on generated tokens is written into each task's settings, where it can be seen and compared; answers that
ended at the limit are counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import difflib
import functools
import logging
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import lm_eval
import lm_eval.api.model
import lm_eval.api.task
import lm_eval.models.api_models
import lm_eval.models.huggingface
from lm_eval.api.registry import get_model
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import handle_non_serializable, sanitize_list
from transformers import LogitsProcessor

from k2quant.errors import EvaluationError, HarnessFault, K2QuantError, MissingExtra, UsageError
from k2quant.eval.asking.localdata import find_files, loader, local_files
from k2quant.eval.asking.server import Server

VERSION: str = lm_eval.__version__

NEW_TOKENS = 1024
"""The most tokens that a model may write where neither the task nor the user says; lm-eval's 256 cuts reasoning."""


class Tasks(NamedTuple):
    """Tasks of lm-eval with their data, ready to be asked."""

    loaded: dict[str, Any]
    """As `TaskManager.load` returns them."""
    limit: int | None

    @property
    def by_name(self) -> dict[str, Any]:
        """The tasks that are asked, groups resolved."""
        tasks: dict[str, Any] = self.loaded["tasks"]
        return tasks

    @property
    def scored(self) -> list[str]:
        """Names of the tasks that need log-probabilities of given text."""
        return sorted(name for name, task in self.by_name.items() if task.OUTPUT_TYPE != "generate_until")

    def docs(self, name: str) -> list[Any]:
        """Return the documents of a task that are asked, in order."""
        return [doc for _, doc in self.by_name[name].doc_iterator(limit=self.limit)]

    def examples(self, name: str) -> list[Any]:
        """Return the documents that a task draws its shots from."""
        return list(self.by_name[name].fewshot_docs() or [])

    def config(self, name: str) -> dict[str, Any]:
        """Return a task's settings as lm-eval dumps them."""
        return dict(self.by_name[name].dump_config())


def quiet() -> None:
    """Keep log lines and progress bars of lm-eval and `datasets` off the screen; what breaks is raised."""
    for name in ("lm_eval", "datasets", "evaluate", "httpx", "filelock", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger(lm_eval.models.api_models.__name__).setLevel(logging.CRITICAL)  # a line for every retry
    lm_eval.api.task.datasets.disable_progress_bars()
    for module in (lm_eval.api.task, lm_eval.api.model, lm_eval.models.huggingface, lm_eval.models.api_models):
        module.tqdm = _NoBar  # lm-eval has no switch for them
    lm_eval.models.api_models.tqdm_asyncio = SimpleNamespace(gather=_gather)


async def _gather(*tasks: Any, **_: Any) -> list[Any]:
    return await asyncio.gather(*tasks)


class _NoBar(lm_eval.api.task.tqdm):  # type: ignore[misc]  # lm-eval has no types
    """A progress bar that is not shown."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})


def load_tasks(
    names: Sequence[str],
    *,
    include: Sequence[Path] = (),
    data: Mapping[str, Path] | None = None,
    shots: int | None = None,
    limit: int | None = None,
    new_tokens: int | None = None,
    unsafe_code: bool = False,
) -> Tasks:
    """Load tasks, groups or tags with their data.

    Args:
        names: as lm-eval knows them, patterns such as `mmlu_*` and paths of YAML files included.
        include: folders with task YAML that stand before lm-eval's own.
        data: by name of a task, group or tag, the file or folder with its data instead of the hub.
        shots: examples before each question instead of each task's own number; a task that fixes 0 keeps it.
        limit: how many documents of each task are asked.
        new_tokens: the most tokens that a model may write, instead of each task's own number.
        unsafe_code: whether tasks may run the code that the model writes.

    Raises:
        UsageError: there is no such task, no data where they were said to be, or a task runs code and may not.
        EvaluationError: a task cannot be loaded, such as from the hub without a network.
    """
    manager = _manager(names, include)
    wanted = _apart(manager, _known(manager, names, include))
    asked = {entry.name: entry for name in wanted for entry in _leaves(manager, name)}
    _check_code(asked.values(), allowed=unsafe_code)
    with _loading(wanted):
        for entry in asked.values():
            _take_local_yaml(manager, entry)
    for name, place in (data or {}).items():
        meant = [entry for known in _known(manager, [name]) for entry in _leaves(manager, known) if entry.name in asked]
        if not meant:
            raise UsageError(f"data for {name!r}, which is not among the tasks")
        with _loading(wanted):
            for entry in meant:
                _take_data(manager, entry, place)
    with _loading(wanted):
        loaded = manager.load(wanted)
    if not loaded["tasks"]:
        raise UsageError(f"{', '.join(wanted)}: holds no task")
    for task in loaded["tasks"].values():
        _settle(task, shots, new_tokens)
    return Tasks(loaded, limit)


@functools.cache
def own_tasks() -> Any:
    """Return the manager of lm-eval's own tasks; to read its 10,000 files takes seconds, so once in a process."""
    return TaskManager()


def _manager(names: Sequence[str], include: Sequence[Path]) -> Any:
    """Return a manager of task YAML that is free to be changed; lm-eval's own files are read only if they must."""
    for folder in include:
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder of task YAML")
    given = TaskManager(include_path=[str(folder) for folder in include], include_defaults=False)
    if include and all(name in given.task_index for name in names):
        return given
    manager = copy.copy(own_tasks())
    manager._index = {**manager.task_index, **given.task_index}  # noqa: SLF001  as its constructor does
    manager._all_tasks = sorted(manager.task_index)  # noqa: SLF001  the same
    return manager


def _known(manager: Any, names: Sequence[str], include: Sequence[Path] = ()) -> list[str]:
    wanted: list[str] = []
    for name in names:
        matches = [name] if name in manager.task_index or Path(name).is_file() else manager.match_tasks([name])
        if not matches:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else "; `lm-eval ls tasks` lists all"
            raise UsageError(f"lm-eval {VERSION} has no task {name!r}{_unreadable(include) or hint}")
        wanted += [match for match in matches if match not in wanted]
    return wanted


def _unreadable(include: Sequence[Path]) -> str | None:
    """Name a YAML file that lm-eval passes over in silence, or return None."""
    for path in (path for folder in include for path in sorted(folder.rglob("*.yaml"))):
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:  # noqa: BLE001  whatever a file of somebody's makes of it
            return f"; {path} cannot be read: {_said(error)}"
    return None


def _apart(manager: Any, names: list[str]) -> list[str]:
    """Leave out names whose tasks are all in another one: lm-eval takes no task twice."""
    tasks = {name: {entry.name for entry in _leaves(manager, name)} for name in names}
    kept: list[str] = []
    for name in names:
        inside = any(tasks[name] < tasks[other] for other in names) or any(
            tasks[name] == tasks[other] for other in kept
        )
        if not (tasks[name] and inside):
            kept.append(name)
    return kept


def _leaves(manager: Any, name: str, above: tuple[str, ...] = ()) -> list[Entry]:
    """Return the tasks that a name stands for, groups and tags resolved."""
    entry = manager.task_index.get(name)
    if entry is None:
        return []
    if name in above:
        raise UsageError(f"group {name!r} is part of itself")
    above = (*above, name)
    if entry.kind is Kind.TAG:
        return [leaf for tagged in sorted(entry.tags) for leaf in _leaves(manager, tagged, above)]
    if entry.kind is not Kind.GROUP:
        return [entry]
    members = entry.cfg.get("task") or []
    called = [
        member.get("task") or member.get("group") if isinstance(member, Mapping) else member for member in members
    ]
    return [leaf for member in called if isinstance(member, str) for leaf in _leaves(manager, member, above)]


def _check_code(entries: Iterable[Entry], *, allowed: bool) -> None:
    names = [entry.name for entry in entries if entry.cfg and entry.cfg.get("unsafe_code")]
    if names and not allowed:
        raise UsageError(
            f"{', '.join(names)}: runs the code that the model writes; allow it with --confirm-unsafe-code"
        )
    if names:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # what the metric of these tasks asks for


def _take_data(manager: Any, entry: Entry, place: Path) -> None:
    """Have a task read local files; all else stays as its YAML has it."""
    config = load_yaml(entry.yaml_path, resolve_func=True) if entry.yaml_path else dict(entry.cfg)
    asked = config.get("test_split") or config.get("validation_split")
    if "class" in config or not asked:
        raise UsageError(f"task {entry.name!r} brings its own code for data; it cannot read {place}")
    examples = [config.get(key) for key in ("fewshot_split", "training_split", "validation_split")]
    splits = tuple(dict.fromkeys([asked, *filter(None, examples)]))
    names = tuple(filter(None, (config.get("dataset_name"), entry.name)))
    _replace(manager, entry, config, loader(find_files(place, splits, names=names)))


def _take_local_yaml(manager: Any, entry: Entry) -> None:
    """Have a task whose YAML names local JSON files read them without the cache of `datasets`."""
    found = local_files(entry.cfg.get("dataset_path"), entry.cfg.get("dataset_kwargs")) if entry.cfg else None
    if found and entry.yaml_path:
        _replace(manager, entry, load_yaml(entry.yaml_path, resolve_func=True), loader(*found))


def _replace(manager: Any, entry: Entry, config: dict[str, Any], load: Any) -> None:
    config = {**config, "custom_dataset": load}
    manager.task_index[entry.name] = Entry(entry.name, entry.kind, yaml_path=None, cfg=config, tags=entry.tags)


@contextlib.contextmanager
def _loading(names: list[str]) -> Iterator[None]:
    """Name the tasks in whatever loading them ends with.

    Raises:
        MissingExtra: a task needs a package that is not installed.
        EvaluationError: anything else.
    """
    message = f"cannot load {', '.join(names)}"
    try:
        yield
    except K2QuantError:
        raise
    except ModuleNotFoundError as error:
        remedy = 'install what it needs; what the presets need is in  pip install "lm-eval[ifeval,math]"'
        raise MissingExtra(message, found=_said(error), remedy=remedy) from error
    except (Exception, SystemExit) as error:
        remedy = "without a network, name local data with --data TASK=PATH, or fill the cache of `datasets` before"
        raise EvaluationError(
            message, found=_said(error), remedy=remedy if isinstance(error, OSError) else None
        ) from error


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _settle(task: Any, shots: int | None, new_tokens: int | None) -> None:
    """Write what lm-eval would decide on the way into a task's settings, as `simple_evaluate` does."""
    own = task.get_config("num_fewshot")
    task.set_config(key="num_fewshot", value=own or 0 if shots is None or own == 0 else shots)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    if task.OUTPUT_TYPE == "generate_until":
        generation = dict(task.get_config("generation_kwargs") or {})
        named = {"max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"}
        if new_tokens is not None or not named & generation.keys():
            generation = {key: value for key, value in generation.items() if key not in named}
            generation["max_gen_toks"] = new_tokens or NEW_TOKENS
        task.set_config(key="generation_kwargs", value=generation)


class Counting(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """lm-eval's own transformers model; it also notes which answers ended at the limit on new tokens."""

    _contexts: list[str]
    _cut: dict[str, bool]

    def tok_batch_encode(self, strings: list[str], **kwargs: Any) -> Any:
        """Encode contexts, and remember which.

        Raises:
            HarnessFault: one is longer than the model has room for; lm-eval would cut its beginning off and go on.
        """
        self._contexts = list(strings)
        room = kwargs.pop("left_truncate_len", None)
        ids, mask = super().tok_batch_encode(strings, **kwargs)
        if room is not None and ids.shape[1] > room:
            raise _no_room(ids.shape[1], room)
        return ids, mask

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **kwargs: Any) -> Any:
        output = super()._model_generate(context, max_length, stop, logits_processor=[_Numbers()], **kwargs)
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends]) | {self.eot_token_id}
        for text, row in zip(self._contexts, output[:, context.shape[1] :].tolist(), strict=True):
            written = self.tokenizer.decode(row)
            ended = ends & set(row) or any(word and word in written for word in stop)
            self._cut[text] = len(row) == max_length - context.shape[1] and not ended
        return output

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Write answers."""
        self._cut = {}
        answers: list[str] = super().generate_until(requests, disable_tqdm=True)
        return answers

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        _check_room(requests, self.max_length)
        scores: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, *args, **kwargs)
        return scores

    def were_cut(self, requests: list[Any], answers: list[str]) -> list[bool]:  # noqa: ARG002  others look at the answers
        """Return for each of the last requests whether its answer ended at the limit."""
        return [self._cut[request.args[0]] for request in requests]


class _Numbers(LogitsProcessor):
    """Refuses logits from which any token would be as good as another."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:  # noqa: ARG002  transformers' signature
        """Return the logits as they are.

        Raises:
            HarnessFault: one is NaN.
        """
        if scores.isnan().any():
            raise HarnessFault(
                "the model's logits are no numbers", found="NaN", remedy="is a weight NaN, or --dtype too narrow?"
            )
        return scores


def _check_room(requests: list[Any], room: int) -> None:
    """Refuse texts to score that lm-eval would cut the beginning off.

    Raises:
        HarnessFault: one has more tokens than that.
    """
    longest = max((len(context) + len(continuation) for _, context, continuation in requests), default=0)
    if longest > room + 1:  # the last token is predicted, never read
        raise _no_room(longest, room)


def _no_room(found: int, room: int) -> HarnessFault:
    remedy = "fewer --shots or --max-new-tokens, or a larger --max-length if the model can take it"
    return HarnessFault("a prompt is too long", expected=f"at most {room} tokens", found=found, remedy=remedy)


def transformers_model(model: Any, tokenizer: Any, *, batch_size: int, max_length: int) -> Any:
    """Return lm-eval's model around a transformers model.

    Prompts begin as the tokenizer's own post-processor has them, with the BOS token or without.

    Args:
        model: a causal LM in evaluation mode.
        tokenizer: its tokenizer.
        batch_size: how many texts it is given at once.
        max_length: the most tokens of prompt and answer.
    """
    lm = Counting(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, max_length=max_length)
    if model.device.type == "meta":  # its first weights lie on the disk
        lm._device = model.assembly.device  # noqa: SLF001  there is no other way to say it
    return lm


class _Told:
    """What both kinds of server share: tell which answers the server says it cut, and strip stop strings."""

    server: Server

    def generate_until(self, requests: list[Any]) -> list[str]:
        with self.server.blamed():
            texts = super().generate_until(requests)  # type: ignore[misc]
        return [_ended(text, request.args[1].get("until")) for text, request in zip(texts, requests, strict=True)]

    def parse_generations(self, outputs: Any, **kwargs: Any) -> list[Any]:
        texts = super().parse_generations(outputs, **kwargs)  # type: ignore[misc]
        outputs = outputs if isinstance(outputs, list) else [outputs]
        reasons = [choice.get("finish_reason") for output in outputs for choice in output["choices"]]
        return [self._told(text, reason) for text, reason in zip(texts, reasons, strict=True)]

    def _told(self, text: Any, reason: object) -> str:
        text = "" if text is None else text  # all tokens went into reasoning; lm-eval writes the same
        if not isinstance(text, str):
            raise HarnessFault("an answer that is no text", file=self.server.url, found=type(text).__name__)
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half a character fits in no file
        return _Cut(text) if reason == "length" else text

    def were_cut(self, requests: list[Any], answers: list[str]) -> list[bool]:  # noqa: ARG002  others look at the requests
        return [isinstance(answer, _Cut) for answer in answers]


class _Cut(str):
    """A text that the server says it cut at the limit."""

    __slots__ = ()


def _ended(text: str, until: Any) -> str:
    """Cut a text before its first stop string, which some servers leave in; keep it known as cut where it has none."""
    found = text
    for stop in [until] if isinstance(until, str) else until or []:
        found = found.split(stop)[0] if stop else found
    return text if found == text else found


class _Completions(_Told, LocalCompletionsAPI):  # type: ignore[misc]  # lm-eval has no types
    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        _check_room(requests, self.max_length)
        scores: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, **kwargs)
        return scores

    def parse_logprobs(self, outputs: Any, tokens: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        outputs = outputs if isinstance(outputs, list) else [outputs]
        choices = [choice for output in outputs for choice in output["choices"]]
        for asked, choice in zip(tokens, choices, strict=True):
            self.server.check_echo(len(asked), choice["logprobs"]["token_logprobs"])
        scores: list[tuple[float, bool]] = super().parse_logprobs(outputs, tokens, **kwargs)
        return scores

    def loglikelihood(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        """Score continuations by tokens: the server then adds no BOS token of its own, which would shift them."""
        self.tokenized_requests = True
        try:
            with self.server.blamed():
                scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True, **kwargs)
        finally:
            self.tokenized_requests = False
        return scores

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        self.tokenized_requests = True
        try:
            with self.server.blamed():
                scores: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        finally:
            self.tokenized_requests = False
        return scores


class _Chat(_Told, LocalChatCompletion):  # type: ignore[misc]  # lm-eval has no types
    pass


def served_model(server: Server, tokenizer: Any | None, *, at_once: int, max_length: int) -> Any:
    """Return lm-eval's model behind an OpenAI-style server.

    Texts to continue are sent as text, so that the server's own tokenizer gives them their BOS token; texts to score
    are sent as tokens of `tokenizer`, because places of log-probabilities must be known.

    Args:
        server: where it is and what it is called there.
        tokenizer: of the model; needed for scoring only.
        at_once: requests under way at the same time.
        max_length: the most tokens of a text that is scored.
    """
    kind = _Chat if server.chat else _Completions
    lm = kind(
        model=server.model,
        base_url=server.url,
        tokenizer_backend=None,
        tokenized_requests=False,
        num_concurrent=at_once,
        batch_size=1,
        max_length=max_length,
        eos_string="",
        timeout=server.timeout,
    )
    lm.server = server
    if tokenizer is not None:
        lm.tokenizer, lm.tokenizer_backend, lm.add_bos_token = tokenizer, "huggingface", True
    return lm


class _Uncounted:
    """A model of lm-eval's of which nobody knows which answers were cut."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def were_cut(self, requests: list[Any], answers: list[str]) -> list[None]:  # noqa: ARG002  see the others
        return [None] * len(requests)


def vllm_model(settings: dict[str, Any]) -> Any:
    """Return lm-eval's vLLM model.

    Args:
        settings: of that model, such as `pretrained` and `dtype`.
    """
    return _Uncounted(get_model("vllm")(**settings))


def ask(lm: Any, tasks: Tasks, *, chat_template: bool, unsafe_code: bool) -> dict[str, Any]:
    """Ask a model all questions and score its answers, with lm-eval's own code and seeds.

    Returns:
        lm-eval's results, samples included.

    Raises:
        EvaluationError: lm-eval gave up.
    """
    import numpy as np
    import torch

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)  # noqa: NPY002  lm-eval's tasks use it
    torch.manual_seed(DEFAULT_OTHER_SEED)
    try:
        results: dict[str, Any] = evaluate(
            lm,
            tasks.loaded,
            limit=tasks.limit,
            apply_chat_template=chat_template,
            fewshot_as_multiturn=chat_template,
            confirm_run_unsafe_code=unsafe_code,
        )
    except (K2QuantError, OSError):
        raise
    except (Exception, SystemExit) as error:
        raise EvaluationError("lm-eval stopped", found=_said(error)) from error
    return results


def as_written(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sample as lm-eval's own command line writes it: every response a string."""
    row = dict(sample)
    row["arguments"] = {
        f"gen_args_{number}": {f"arg_{place}": part for place, part in enumerate(request)}
        for number, request in enumerate(copy.deepcopy(sample["arguments"]))
    }
    row["resps"] = sanitize_list(sample["resps"])
    row["filtered_resps"] = sanitize_list(sample["filtered_resps"])
    row["target"] = str(sample["target"])
    return row


plain = handle_non_serializable
"""Turns what JSON does not have, such as numpy's numbers, into what it has: lm-eval's own way."""
