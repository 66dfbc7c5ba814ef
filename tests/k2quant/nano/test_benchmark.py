"""nano-K2's tasks as lm-eval reads tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from k2quant.nano import tasks
from k2quant.nano.benchmark import CHOICE, GROUP, LINES, TEXT, write_tasks

COUNT = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tasks with four items of each family and level."""
    place = tmp_path_factory.mktemp("tasks")
    write_tasks(place, COUNT)
    return place


def rows(path: Path) -> list[dict[str, Any]]:
    """Return JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_a_task_holds_the_held_out_items_of_its_family(family: str, folder: Path) -> None:
    """In the order of the levels, in the file beside it; no answer is longer than what may be written."""
    task = yaml.safe_load((folder / f"nano_{family}.yaml").read_text(encoding="utf-8"))
    found = rows(Path(task["dataset_kwargs"]["data_files"]["test"]))
    expected = [item for level in tasks.LEVELS for item in tasks.items(family, level, COUNT)]
    assert [(row["question"], row["answer"]) for row in found] == [(item.question, item.answer) for item in expected]
    assert all(tasks.split_of(row["question"]) == "heldout" for row in found)
    assert max(len(row["answer"]) for row in found) + 1 < task["generation_kwargs"]["max_gen_toks"]


def test_the_group_has_every_family(folder: Path) -> None:
    """Weighted by items."""
    group = yaml.safe_load((folder / f"{GROUP}.yaml").read_text(encoding="utf-8"))
    assert group["task"] == [f"nano_{family}" for family in tasks.FAMILIES]


def test_choices_are_four_different_answers_of_which_one_is_right(folder: Path) -> None:
    """The wrong ones are as long as the right one, whose place is not always the same."""
    found = rows(folder / f"{CHOICE}.jsonl")
    assert len(found) == COUNT * len(tasks.LEVELS) * len(tasks.FAMILIES)
    for row in found:
        assert row["choices"][row["right"]] == row["answer"]
        assert len(set(row["choices"])) == 4
        assert {len(choice) for choice in row["choices"]} == {len(row["answer"])}
    assert {row["right"] for row in found} == {0, 1, 2, 3}


def test_the_text_has_every_item_once(folder: Path) -> None:
    """As prompts with completions, of which only these are scored; the plain one has the same, an item a line."""
    found = rows(folder / TEXT)
    items = {(item.question, item.answer) for item in tasks.exam(COUNT)}
    assert {(row["prompt"], row["completion"]) for row in found} == items
    assert len(found) == len(items)
    lines = (folder / LINES).read_text(encoding="utf-8").splitlines()
    assert lines == [f"{row['prompt']}{row['completion']}" for row in found]


def test_more_items_begin_with_the_fewer_ones(folder: Path, tmp_path: Path) -> None:
    """So that a larger run asks again what a smaller one asked."""
    write_tasks(tmp_path, COUNT + 1)
    fewer, more = (rows(place / "nano_sort.jsonl") for place in (folder, tmp_path))
    assert [row for row in fewer if row["level"] == 1] == [row for row in more if row["level"] == 1][:COUNT]
