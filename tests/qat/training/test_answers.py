"""Answers of held-out rows: which documents are answers, and which of them a model has wholly right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from k2quant.cli import main
from k2quant.data.packing import NO_TARGET, Document, batch, pack
from k2quant.errors import MalformedFile
from k2quant.qat.job import job_from
from k2quant.qat.run.history import HISTORY, read_history
from k2quant.qat.training.measuring import Measures
from k2quant.qat.training.task import Task, judged
from k2quant.qat.training.training import train
from tiny import job_content, write_model

pytestmark = pytest.mark.usefixtures("one_thread", "sketched")

TOKENS = 8


class Oracle(nn.Module):
    """A model that foretells the next token of its rows, but not where it is told to be wrong."""

    def __init__(self, targets: Tensor, wrong: Tensor) -> None:
        super().__init__()
        said = torch.where(wrong, (targets + 1) % TOKENS, targets).clamp(min=0)
        self.hidden = nn.functional.one_hot(said.long(), TOKENS).float()
        self.lm_head = nn.Identity()

    def model(self, **_: object) -> Any:
        """Return what it foretells."""
        return SimpleNamespace(last_hidden_state=self.hidden)


DOCUMENTS = st.lists(st.tuples(st.lists(st.booleans(), min_size=2, max_size=9), st.booleans()), min_size=1, max_size=9)


@settings(max_examples=60, deadline=None)
@given(DOCUMENTS, st.integers(0, 2**32))
def test_an_answer_is_right_when_its_every_token_is(documents: list[tuple[list[bool], bool]], seed: int) -> None:
    """Row by row, of the documents that begin with what is not learnt, those without a wrong token are counted."""
    dice = np.random.default_rng(seed)
    rows = pack(
        (
            Document(
                tokens=dice.integers(0, TOKENS, len(learnt)).astype(np.int32),
                learnt=np.array(learnt),
                divisible=divisible,
            )
            for learnt, divisible in documents
        ),
        length=6,
        padding=0,
    )
    if not len(rows.tokens):
        return
    wrong = torch.from_numpy(dice.random(rows.targets.shape) < 0.2)
    task = Task(cast("nn.Module", Oracle(rows.targets, wrong)), None, torch.float32)
    found = judged(task, batch(rows, torch.arange(len(rows.tokens))))
    for row, (positions, targets) in enumerate(zip(rows.positions.tolist(), rows.targets.tolist(), strict=True)):
        starts = [place for place, position in enumerate(positions) if position == 0]
        spans = [range(begin, end) for begin, end in zip(starts, [*starts[1:], len(positions)], strict=True)]
        asked = [
            span
            for span in spans
            if targets[span[0]] == NO_TARGET and any(targets[place] != NO_TARGET for place in span)
        ]
        right = [span for span in asked if not any(targets[n] != NO_TARGET and wrong[row, n] for n in span)]
        assert (int(found.answers[row]), int(found.right[row])) == (len(asked), len(right))
    assert found.learnt.tolist() == (rows.targets != NO_TARGET).sum(1).tolist()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and questions. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("answers")
    write_model(folder / "model")
    lines = [{"prompt": f"{chr(97 + n % 26)}?", "completion": "a"} for n in range(200)]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_training_says_how_many_answers_are_right(sources: Path, ram: Path) -> None:
    """History and last lines have them, at the start and now; a run that resumes knows those of its start."""
    content = job_content(ram, training={"steps": 8}, optimizer={"rate": 3e-2}, saving={"every": 4})
    content |= {"model": str(sources / "model"), "data": {**content["data"], "path": str(sources / "data.jsonl")}}
    (ram / "job.yaml").write_text(json.dumps(content))
    shown = CliRunner().invoke(main, ["qat", "train", str(ram / "job.yaml")], env={"COLUMNS": "60"})
    assert shown.exit_code == 0, shown.output
    last = read_history(ram / "run" / HISTORY).evaluations[-1].answers
    assert last is not None
    assert (last.count, last.start, last.start_rounded) == (last.right, 0, 0)
    assert f"right of {last.count} answers" in shown.stdout
    assert "100% of the answers are right." in shown.stdout
    assert max(map(len, shown.stdout.splitlines()[1:-2])) <= 60
    state = json.loads((ram / "run" / "checkpoints" / "step-00000008" / "state.json").read_text())
    assert (state["start"]["start_right"], state["start"]["start_rounded_right"]) == (0, 0)
    shutil.rmtree(ram / "run" / "checkpoints" / "step-00000008")
    assert train(job_from(content)).resumed == 4
    assert read_history(ram / "run" / HISTORY).evaluations[-1].answers == last


def test_texts_are_no_answers(sources: Path, ram: Path) -> None:
    """Where nothing is asked nothing is counted, and the command says who compares answers."""
    (ram / "data.jsonl").write_text('{"text": "abcabcabcabcabc"}\n' * 40)
    content = job_content(ram) | {"model": str(sources / "model")}
    (ram / "job.yaml").write_text(json.dumps(content))
    shown = CliRunner().invoke(main, ["qat", "train", str(ram / "job.yaml")])
    assert shown.exit_code == 0, shown.output
    assert all(found.answers is None for found in read_history(ram / "run" / HISTORY).evaluations)
    assert "no share of answers:\nk2quant eval gate compares those." in shown.stdout


@pytest.mark.parametrize("value", [-1, 1.0, True, None, "1"])
def test_damaged_counts_of_the_start_are_refused(value: object) -> None:
    """A checkpoint whose right answers are no count is named."""
    measures = Measures(cast("Any", None), cast("Any", None), cast("Any", None), torch.device("cpu"))
    with pytest.raises(MalformedFile, match=r"state\.json.*no count"):
        measures.restore({"start": 1.0, "start_right": value}, file="state.json")
    measures.restore({"start": 1.0, "start_right": 3}, file="state.json")
    assert measures.state() == {"start": 1.0, "start_right": 3}
