"""Tasks of lm-eval with their data, and with what it would decide on the way written into their settings."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.tasks._index import Entry
from lm_eval.tasks._yaml_loader import load_yaml

from k2quant.errors import EvaluationError, K2QuantError, MissingExtra, UsageError
from k2quant.eval.asking.harness.naming import apart, leaves, manager_of, resolved
from k2quant.eval.asking.localdata import find_files, loader, local_files
from k2quant.ground.saying.faults import said

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

    @property
    def answered(self) -> list[str]:
        """Names of the tasks that begin the answer themselves, as some do with ```` ```python ````."""
        return sorted(name for name, task in self.by_name.items() if task.get_config("gen_prefix"))

    def docs(self, name: str) -> list[Any]:
        """Return the documents of a task that are asked, in order."""
        return [doc for _, doc in self.by_name[name].doc_iterator(limit=self.limit)]

    def examples(self, name: str) -> list[Any]:
        """Return the documents that a task draws its shots from."""
        return list(self.by_name[name].fewshot_docs() or [])

    def config(self, name: str) -> dict[str, Any]:
        """Return a task's settings as lm-eval dumps them."""
        return dict(self.by_name[name].dump_config())


def load_tasks(
    names: Sequence[str],
    *,
    include: Sequence[Path] = (),
    data: Mapping[str, Path] | None = None,
    shots: int | None = None,
    limit: int | None = None,
    new_tokens: int | None = None,
    sampling: Mapping[str, Any] | None = None,
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
        sampling: how answers are drawn, in lm-eval's words, instead of each task's own way; None or empty for that.
        unsafe_code: whether tasks may run the code that the model writes.

    Raises:
        UsageError: there is no such task, no data where they were said to be, or a task runs code and may not.
        EvaluationError: a task cannot be loaded, such as from the hub without a network.
    """
    manager = manager_of(names, include)
    wanted = apart(manager, resolved(manager, names, include))
    asked = {entry.name: entry for name in wanted for entry in leaves(manager, name)}
    _check_code(asked.values(), allowed=unsafe_code)
    with _loading(wanted):
        for entry in asked.values():
            _take_local_yaml(manager, entry)
    for name, place in (data or {}).items():
        meant = [
            entry for known in resolved(manager, [name]) for entry in leaves(manager, known) if entry.name in asked
        ]
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
        _settle(task, shots, new_tokens, sampling or {})
    return Tasks(loaded, limit)


def _check_code(entries: Iterable[Entry], *, allowed: bool) -> None:
    names = [entry.name for entry in entries if entry.cfg and entry.cfg.get("unsafe_code")]
    if names and not allowed:
        raise UsageError(f"{', '.join(names)}: runs the code that the model writes; allow it with `unsafe_code=True`")
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
        raise MissingExtra(message, found=said(error), remedy=remedy) from error
    except (Exception, SystemExit) as error:
        remedy = "without a network, name local data of the task with `data=`, or fill the cache of `datasets` before"
        raise EvaluationError(
            message, found=said(error), remedy=remedy if isinstance(error, OSError) else None
        ) from error


_NARROWING = {"do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p"}
"""What a task may say of how answers are drawn."""


def _settle(task: Any, shots: int | None, new_tokens: int | None, sampling: Mapping[str, Any]) -> None:
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
        if sampling:
            kept = {key: value for key, value in generation.items() if key not in _NARROWING}
            generation = {**kept, **sampling}
        task.set_config(key="generation_kwargs", value=generation)
