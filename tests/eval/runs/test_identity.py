"""Hashes over content, and the journal that a killed evaluation resumes from."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2quant.errors import CheckpointError, HarnessFault, MissingTensor
from k2quant.eval.runs.identity import digest, model_hash, task_hash, tokenizer_hash
from k2quant.eval.runs.journal import Journal
from k2quant.eval.runs.resuming import Resuming


def changed(folder: Path, name: str, place: int) -> None:
    """Turn one bit of a file."""
    data = bytearray((folder / name).read_bytes())
    data[place] ^= 1
    (folder / name).write_bytes(data)


def shard(folder: Path) -> str:
    """Return the name of a shard."""
    return min(path.name for path in folder.glob("*.safetensors"))


def test_a_model_is_its_content(k2_bf16: Path, tmp_path: Path) -> None:
    """The place, the times and files beside it play no part; the last bit of a shard does, and the config."""
    copy = tmp_path / "elsewhere"
    shutil.copytree(k2_bf16, copy)
    (copy / "README.md").write_text("other")
    for path in copy.iterdir():
        os.utime(path, (1, 1))
    before = model_hash(k2_bf16)
    assert model_hash(copy) == before
    changed(copy, shard(copy), -1)
    after = model_hash(copy)
    assert after != before
    changed(copy, shard(copy), -1)
    assert model_hash(copy) == before
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert model_hash(copy) not in {before, after}


def test_links_of_a_cache_are_followed_and_no_others(k2_bf16: Path, tmp_path: Path) -> None:
    """A snapshot whose files are links into its repository is the same model; a link out of a folder is refused."""
    snapshot = tmp_path / "models--x" / "snapshots" / "1"
    blobs = tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(k2_bf16, blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert model_hash(snapshot) == model_hash(k2_bf16)
    plain = tmp_path / "plain"
    plain.mkdir()
    for path in k2_bf16.iterdir():
        (plain / path.name).symlink_to(path)
    with pytest.raises(CheckpointError, match="leaves the folder"):
        model_hash(plain)


def test_a_model_without_a_shard_has_no_hash(k2_bf16: Path, tmp_path: Path) -> None:
    """A shard that the index names must be there."""
    copy = tmp_path / "copy"
    shutil.copytree(k2_bf16, copy)
    (copy / shard(copy)).unlink()
    with pytest.raises(MissingTensor):
        model_hash(copy)
    with pytest.raises(MissingTensor, match="no safetensors"):
        model_hash(tmp_path)


def test_progress_ends_with_all_bytes(k2_bf16: Path) -> None:
    """Progress counts the bytes of everything that is hashed."""
    seen: list[tuple[int, int]] = []
    model_hash(k2_bf16, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] >= sum(path.stat().st_size for path in k2_bf16.glob("*.safetensors"))


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "tokenization_kimi.py", "tiktoken.model"])
def test_a_tokenizer_is_its_files(tmp_path: Path, name: str) -> None:
    """Templates and code are part of a tokenizer; weights and readmes are not; without files there is no hash."""
    (tmp_path / "README.md").write_text("1")
    assert tokenizer_hash(tmp_path) is None
    (tmp_path / name).write_text("1")
    before = tokenizer_hash(tmp_path)
    (tmp_path / "README.md").write_text("2")
    assert tokenizer_hash(tmp_path) == before
    (tmp_path / name).write_text("2")
    assert tokenizer_hash(tmp_path) != before


def test_a_task_is_its_settings_and_documents() -> None:
    """Where the data lie plays no part; the prompt, the version, each document and their order do."""
    config = {"task": "t", "doc_to_text": "{{q}}", "dataset_path": "json", "metadata": {"version": 1, "source": "/a"}}
    docs = [{"q": "1"}, {"q": "2"}]
    moved = {**config, "dataset_path": "hub/t", "dataset_kwargs": {"data_files": "/b"}, "metadata": {"version": 1}}
    same = task_hash(config, docs)
    assert task_hash(moved, docs) == same
    others = [
        task_hash({**config, "doc_to_text": "{{q}} "}, docs),
        task_hash({**config, "metadata": {"version": 2}}, docs),
        task_hash(config, docs[::-1]),
        task_hash(config, [*docs, docs[0]]),
        task_hash(config, [{"q": "1"}, {"q": "3"}]),
    ]
    assert len({same, *others}) == 6


def test_functions_are_named_not_addressed() -> None:
    """A function in a task's settings has the same digest in every process."""

    def metric() -> None:
        """Do nothing."""

    assert digest([metric]) == digest([metric.__qualname__])


class Recorder:
    """A model that notes in which batches it was asked, and answers with the length of a text."""

    def __init__(self, stop_after: int | None = None) -> None:
        """Answer so many batches, then be killed."""
        self.batches: list[list[str]] = []
        self.left = stop_after

    def _answer(self, requests: list[Any]) -> list[str]:
        if self.left is not None:
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
        self.batches.append([request.args[0] for request in requests])
        return [request.args[0] for request in requests]

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Give each text back."""
        return self._answer(requests)

    def were_cut(self, requests: list[Any], answers: list[str]) -> list[bool]:
        """Every text of odd length was cut."""
        assert len(requests) == len(answers)
        return [len(answer) % 2 == 1 for answer in answers]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Score a pair by its lengths."""
        return [
            (-len(first) - len(request.args[1]) / 7, False)
            for first, request in zip(self._answer(requests), requests, strict=True)
        ]


def asked(*arguments: Any) -> SimpleNamespace:
    """Return a request as lm-eval has it."""
    return SimpleNamespace(args=arguments, arguments=arguments, task_name="t")


TEXTS = st.lists(st.text("ab", max_size=6), min_size=1, max_size=30)
KWARGS = [{"until": ["\n"], "max_gen_toks": 4}, {"until": ["."], "max_gen_toks": 4}]


@settings(deadline=None, max_examples=60)
@given(TEXTS, st.integers(1, 7), st.integers(0, 6), st.randoms())
def test_a_resumed_run_asks_in_the_same_batches(
    texts: list[str], size: int, killed: int, chance: random.Random
) -> None:
    """Stopped anywhere, the rest is asked in the very batches of an undisturbed run, with the same answers."""
    import tempfile

    requests = [asked(text, chance.choice(KWARGS)) for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        whole = Recorder()
        expected = Resuming(whole, Journal(Path(folder) / "a"), batch_size=size).generate_until(requests)
        assert expected == texts
        first, second = Recorder(killed), Recorder()
        try:
            Resuming(first, Journal(Path(folder) / "b"), batch_size=size).generate_until(requests)
        except KeyboardInterrupt:
            assert len(first.batches) == killed
        resumed = Resuming(second, Journal(Path(folder) / "b"), batch_size=size)
        assert resumed.generate_until(requests) == expected
        assert first.batches + second.batches == whole.batches
        assert resumed.cut["t"] == sum(len(text) % 2 for text in texts)


def test_a_torn_line_is_asked_again(tmp_path: Path) -> None:
    """Each way to cut the journal short, and a bit turned in it, loses the lines from there and nothing more."""
    requests = [asked("a" * length, KWARGS[0]) for length in range(1, 6)]
    path = tmp_path / "journal"
    Resuming(Recorder(), Journal(path), batch_size=1).generate_until(requests)
    data = path.read_bytes()
    ends = [place + 1 for place, byte in enumerate(data) if byte == 10]
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        again = Recorder()
        assert Resuming(again, Journal(path), batch_size=1).generate_until(requests) == [r.args[0] for r in requests]
        assert len(again.batches) == 5 - sum(end <= length for end in ends)
        assert path.read_bytes() == data
    damaged = bytearray(data)
    damaged[ends[1] + 30] ^= 1
    path.write_bytes(damaged)
    assert len(Journal(path)) == 2


def test_a_journal_answers_only_what_it_was_asked(tmp_path: Path) -> None:
    """Another limit on new tokens is another question; the same text again is the same."""
    path = tmp_path / "journal"
    Resuming(Recorder(), Journal(path), batch_size=1).generate_until([asked("a", {"max_gen_toks": 1})])
    other = Recorder()
    again = Resuming(other, Journal(path), batch_size=1)
    again.generate_until([asked("a", {"max_gen_toks": 1})])
    assert other.batches == []
    again.generate_until([asked("a", {"max_gen_toks": 2})])
    assert other.batches == [["a"]]


@pytest.mark.parametrize(
    ("scores", "said"), [([0.0] * 4, "all 4 log-probabilities of task t are 0.0"), ([float("nan"), 1.0], "NaN")]
)
def test_scores_that_say_nothing_are_faults(tmp_path: Path, scores: list[float], said: str) -> None:
    """Log-probabilities that are all the same, as of a server that gives none, would be scored as chance."""
    model = SimpleNamespace(loglikelihood=lambda requests: [(scores[int(r.args[1])], False) for r in requests])
    lm = Resuming(model, Journal(tmp_path / "journal"), batch_size=8)
    with pytest.raises(HarnessFault, match=said):
        lm.loglikelihood([asked("q", str(place)) for place in range(len(scores))])


def test_choices_of_a_question_stay_together(tmp_path: Path) -> None:
    """The choices of one context are asked in one chunk, so that lm-eval reads the context once."""
    recorder = Recorder()
    lm = Resuming(recorder, Journal(tmp_path / "journal"), batch_size=1)
    lm.loglikelihood([asked("x" * (1 + number % 50), choice * 9) for number in range(50) for choice in "abcd"])
    assert all(len(batch) <= 64 for batch in recorder.batches)
    assert all(len({*batch}) == len(batch) / 4 for batch in recorder.batches)
    assert json.loads((tmp_path / "journal").read_bytes().split(b"\n")[0][9:])["answers"]
