"""nano-K2's tasks as lm-eval reads tasks: a YAML file each, with the items beside it as JSON lines.

`k2quant eval run NANO --include FOLDER --tasks nano` runs them. An item is right if the answer is wholly right and then
stops, as in `scoring`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import yaml

from k2quant.checkpoint.files.paths import write_whole
from k2quant.nano import tasks
from k2quant.nano.batches import mixture
from k2quant.nano.tasks import Item

GROUP = "nano"
"""The group of all families whose answers are written."""

CHOICE = "nano_choice"
"""The multiple choice over all families; it is no part of the group."""

TEXT = "nano.jsonl"
"""All items, in a random order: a prompt and its completion each, as `k2quant eval fidelity` and `blame` read them."""

LINES = "nano.txt"
"""The same as plain text, an item a line: there questions, which nobody can predict, are scored too."""

TRAIN = "train.jsonl"
"""Items to go on training with, none of them held out, as `k2quant qat train` reads them."""

_TRAINED = 20_000  # items, 1.2 MB
_DRAW = 1_000  # seed of their order, far from those that bases are trained with
_CHOICES = 4
_LONGEST = 24  # tokens; the longest right answer has 13 and the stop token


def write_tasks(folder: Path, count: int = 60, *, seed: int = 0) -> None:
    """Write `nano_reverse` and its five sisters, the group `nano` of them, `nano_choice`, two texts and `train.jsonl`.

    `nano.jsonl` is for `k2quant eval fidelity` and `blame`, `nano.txt` the same as plain text; `train.jsonl` is for
    `k2quant qat train`.

    Args:
        folder: where; it is made if need be, and files of the same names are replaced.
        count: held-out items of each family and level.
        seed: of their draw. Fewer items of a seed are the first of more.

    Raises:
        UsageError: a family has not so many items.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {
        family: [item for level in tasks.LEVELS for item in tasks.items(family, level, count, seed=seed)]
        for family in tasks.FAMILIES
    }
    for family, items in drawn.items():
        _write_rows(folder / f"nano_{family}.jsonl", map(_row, items))
        _write_task(folder, f"nano_{family}", _written_answers())
    _write_rows(folder / f"{CHOICE}.jsonl", (_with_choices(item) for items in drawn.values() for item in items))
    _write_task(folder, CHOICE, _multiple_choice())
    items = [item for family in drawn.values() for item in family]
    Random(seed).shuffle(items)  # noqa: S311 - items, no secrets
    _write_rows(folder / TEXT, map(_completion, items))
    write_whole(folder / LINES, "".join(f"{item.question}{item.answer}\n" for item in items).encode())
    _write_rows(folder / TRAIN, map(_completion, islice(mixture(seed + _DRAW), _TRAINED)))
    group = {
        "group": GROUP,
        "task": [f"nano_{family}" for family in tasks.FAMILIES],
        "aggregate_metric_list": [{"metric": "exact_match", "weight_by_size": True}],
        "metadata": {"version": 1},
    }
    _write_yaml(folder / f"{GROUP}.yaml", group)


def _write_task(folder: Path, name: str, how: Mapping[str, Any]) -> None:
    data = str((folder / f"{name}.jsonl").resolve())  # lm-eval takes no path beside the YAML
    common: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": data}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "target_delimiter": "",
        "num_fewshot": 0,
        "metadata": {"version": 1},
    }
    _write_yaml(folder / f"{name}.yaml", common | dict(how))


def _written_answers() -> dict[str, Any]:
    return {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": _LONGEST},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }


def _multiple_choice() -> dict[str, Any]:
    return {
        "output_type": "multiple_choice",
        "doc_to_target": "{{right}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def _row(item: Item) -> dict[str, Any]:
    return {"question": item.question, "answer": item.answer, "family": item.family, "level": item.level}


def _completion(item: Item) -> dict[str, Any]:
    return {"prompt": item.question, "completion": item.answer}


def _with_choices(item: Item) -> dict[str, Any]:
    """Put the answer among wrong ones that differ from it in a character or two, at a place drawn from the question."""
    random = Random(item.question)  # noqa: S311 - items, no secrets
    choices = [item.answer]
    while len(choices) < _CHOICES:
        wrong = _spoilt(item.answer, random)
        if wrong not in choices:
            choices.append(wrong)
    random.shuffle(choices)
    return _row(item) | {"choices": choices, "right": choices.index(item.answer)}


def _spoilt(answer: str, random: Random) -> str:
    """Return the answer with one character made another of its kind."""
    place = random.randrange(len(answer))
    kind = next(kind for kind in ("0123456789", "abcdefghijklmnopqrstuvwxyz", ")]}>") if answer[place] in kind)
    return answer[:place] + random.choice(kind) + answer[place + 1 :]


def _write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    write_whole(path, yaml.safe_dump(dict(content), sort_keys=False).encode())
