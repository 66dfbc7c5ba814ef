"""Learning from a teacher: the divergence, whole and of its likeliest tokens, and the file that keeps those."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from k2quant.errors import MalformedFile, OutputError, UsageError
from k2quant.qat.job import Distillation
from k2quant.qat.training.distillation import Cache, build_cache, divergence, divergence_of_likeliest
from k2quant.qat.training.task import Hints, Task

VOCABULARY = 12
TARGETS = torch.tensor([[3, -100, 5, 1], [-100, -100, -100, -100], [-100, 2, -100, 7]])
"""Rows with three, no and two learnt tokens."""


def logits(seed: int, tokens: int = 5, spread: float = 3.0) -> Tensor:
    """Return random logits `[tokens, VOCABULARY]`."""
    return torch.randn(tokens, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * spread


def likeliest(teacher: Tensor, top_k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Return ids and log-probabilities as a cache keeps them."""
    logs, ids = functional.log_softmax(teacher / temperature, -1).topk(top_k, -1)
    return ids.int(), logs


class TestDivergence:
    """The maths."""

    @given(st.integers(0, 2**20), st.floats(0.25, 8))
    def test_formula(self, seed: int, temperature: float) -> None:
        """It is the sum of p log(p / q) over tokens and vocabulary, times the squared temperature."""
        ours, theirs = logits(seed), logits(seed + 1)
        p = (theirs.double() / temperature).softmax(-1)
        q = (ours.double() / temperature).softmax(-1)
        expected = float((p * (p / q).log()).sum()) * temperature**2
        assert float(divergence(ours, theirs, temperature)) == pytest.approx(expected, rel=1e-4, abs=1e-4)

    def test_of_itself(self) -> None:
        """It is zero of a student that says what its teacher says, whatever is added to all logits."""
        assert float(divergence(logits(0) + 5, logits(0), 1.0)) == pytest.approx(0, abs=1e-5)

    @given(st.integers(0, 2**20), st.floats(0.5, 4))
    def test_all_likeliest(self, seed: int, temperature: float) -> None:
        """With the whole vocabulary kept, it is the whole divergence, and so is its gradient.

        The tolerance: what is left over is 0, of which no logarithm exists; 1e-6 stands in for it.
        """
        student, teacher = logits(seed).requires_grad_(), logits(seed + 1)
        whole = divergence(student, teacher, temperature)
        part = divergence_of_likeliest(student, *likeliest(teacher, VOCABULARY, temperature), temperature)
        assert float(part.detach()) == pytest.approx(float(whole.detach()), rel=1e-4, abs=2e-3)
        expected, found = (torch.autograd.grad(one, student)[0] for one in (whole, part))
        assert torch.allclose(found, expected, atol=1e-3)

    @given(st.integers(0, 2**20), st.integers(1, VOCABULARY), st.floats(0.5, 4))
    def test_lower_bound(self, seed: int, top_k: int, temperature: float) -> None:
        """Fewer tokens give no more than the whole, and never less than nothing."""
        student, teacher = logits(seed), logits(seed + 1)
        whole = float(divergence(student, teacher, temperature))
        part = float(divergence_of_likeliest(student, *likeliest(teacher, top_k, temperature), temperature))
        assert -1e-3 <= part <= whole * (1 + 1e-5) + 1e-3

    def test_sure_teacher(self) -> None:
        """A teacher that is certain leaves nothing over, and neither value nor gradient is infinite."""
        student = logits(0).requires_grad_()
        teacher = torch.full((5, VOCABULARY), -1e4)
        teacher[:, 3] = 0
        found = divergence_of_likeliest(student, *likeliest(teacher, 2, 1.0), 1.0)
        found.backward()
        assert math.isfinite(float(found.detach()))
        assert student.grad is not None
        assert student.grad.isfinite().all()

    def test_gradient_pulls_towards_the_teacher(self) -> None:
        """A step against the gradient brings the student nearer to a teacher known by three tokens."""
        student, teacher = logits(0).requires_grad_(), logits(1)
        hints = likeliest(teacher, 3, 1.0)
        divergence_of_likeliest(student, *hints, 1.0).backward()
        assert student.grad is not None
        nearer = student.detach() - 0.1 * student.grad
        assert divergence(nearer, teacher, 1.0) < divergence(student.detach(), teacher, 1.0)


class _Model(torch.nn.Module):
    """What `Task` wants of a causal LM, of an embedding alone."""

    class _Inner(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(VOCABULARY, 8)

        def forward(self, input_ids: Tensor, **_: object) -> object:
            from types import SimpleNamespace

            return SimpleNamespace(last_hidden_state=self.table(input_ids))

    def __init__(self) -> None:
        super().__init__()
        self.model = self._Inner()
        self.lm_head = torch.nn.Linear(8, VOCABULARY, bias=False)


class TestTask:
    """What a step minimises."""

    def test_two_kinds_of_hints(self) -> None:
        """Cross-entropy and divergence are summed over the learnt tokens alone; both kinds of hints agree."""
        torch.manual_seed(0)
        model = _Model()
        task = Task(model, Distillation(temperature=2.0), torch.float32)
        rows = {"input_ids": TARGETS.clamp(min=0), "position_ids": torch.zeros_like(TARGETS), "targets": TARGETS}
        learnt = TARGETS != -100
        student = model.lm_head(model.model.table(rows["input_ids"][learnt]))
        teacher = logits(3)
        entropy, gap = task(rows, Hints(logits=teacher))
        assert entropy.item() == pytest.approx(5 * functional.cross_entropy(student, TARGETS[learnt]).item(), rel=1e-5)
        assert gap.item() == pytest.approx(divergence(student, teacher, 2.0).item(), rel=1e-5)
        ids, logs = likeliest(teacher, VOCABULARY, 2.0)
        assert task(rows, Hints(ids=ids, logs=logs))[1].item() == pytest.approx(gap.item(), rel=1e-3)
        assert task(rows)[1] == 0


class Asked:
    """A teacher that counts how often it is asked."""

    def __init__(self) -> None:
        """Nobody has asked yet."""
        self.rows: list[int] = []

    def __call__(self, row: int) -> Tensor:
        """Return the logits of a row's learnt tokens."""
        self.rows.append(row)
        return logits(row, int((TARGETS[row] != -100).sum()))


def build(path: Path, teacher: Callable[[int], Tensor], *, top_k: int = 4, temperature: float = 1.0) -> None:
    """Build the cache of `TARGETS`."""
    build_cache(path, TARGETS, teacher, top_k=top_k, temperature=temperature, identity={"teacher": {"a": 1}})


class TestCache:
    """What a teacher said once."""

    def test_rows(self, tmp_path: Path) -> None:
        """Rows come in whatever order they are asked for, those without a learnt token empty."""
        path = tmp_path / "teacher.safetensors"
        build(path, Asked())
        ids, logs = Cache(path, TARGETS, VOCABULARY).rows(torch.tensor([2, 1, 0, 2]))
        said = [likeliest(logits(row, count), 4, 1.0) for row, count in ((2, 2), (0, 3), (2, 2))]
        assert torch.equal(ids, torch.cat([one for one, _ in said]))
        assert torch.equal(logs, torch.cat([two for _, two in said]))

    def test_asked_once(self, tmp_path: Path) -> None:
        """A finished cache of the same identity is taken; another temperature, k or teacher asks anew."""
        path, teacher = tmp_path / "teacher.safetensors", Asked()
        build(path, teacher)
        build(path, teacher)
        assert teacher.rows == [0, 1, 2]
        for change in ({"top_k": 3}, {"temperature": 2.0}):
            build(path, teacher, **change)
        build_cache(path, TARGETS, teacher, top_k=3, temperature=2.0, identity={"teacher": {"a": 2}})
        assert len(teacher.rows) == 12

    def test_interrupted(self, tmp_path: Path) -> None:
        """A cache that was not finished is not taken for one."""
        path, teacher = tmp_path / "teacher.safetensors", Asked()

        def breaks(row: int) -> Tensor:
            if row == 2:
                raise KeyboardInterrupt
            return teacher(row)

        with pytest.raises(KeyboardInterrupt):
            build(path, breaks)
        assert not path.exists()
        build(path, teacher)
        assert teacher.rows == [0, 1, 0, 1, 2]

    def test_interrupted_anew(self, tmp_path: Path) -> None:
        """While a cache is made anew, the old file is not taken for the new one's."""
        path = tmp_path / "teacher.safetensors"
        build(path, Asked())

        def breaks(_row: int) -> Tensor:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            build(path, breaks, top_k=3)
        teacher = Asked()
        build(path, teacher)
        assert teacher.rows == [0, 1, 2]

    def test_more_than_the_vocabulary(self, tmp_path: Path) -> None:
        """More tokens than there are cannot be kept."""
        with pytest.raises(UsageError, match="top_k 13 is more than the 12"):
            build(tmp_path / "teacher.safetensors", Asked(), top_k=VOCABULARY + 1)

    def test_disk_full(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A full disk is an output error that names the file."""

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "ftruncate", full)
        with pytest.raises(OutputError, match=r"teacher\.safetensors.*No space left"):
            build(tmp_path / "teacher.safetensors", Asked())

    @pytest.mark.parametrize("kind", ["cut", "lacks", "wider", "shorter", "dtype", "flat"])
    def test_damaged(self, tmp_path: Path, kind: str) -> None:
        """A damaged file is an error that names it."""
        path = tmp_path / "teacher.safetensors"
        build(path, Asked())
        tensors = load_file(path)
        if kind == "cut":
            path.write_bytes(path.read_bytes()[:-4])
        else:
            ids, logs = tensors["ids"], tensors["log_probabilities"]
            changed = {
                "lacks": {"ids": ids},
                "wider": {"ids": ids, "log_probabilities": torch.zeros(5, 9)},
                "shorter": {"ids": ids[:-1].clone(), "log_probabilities": logs[:-1].clone()},
                "dtype": {"ids": ids.long(), "log_probabilities": logs},
                "flat": {"ids": ids.flatten(), "log_probabilities": logs.flatten()},
            }
            save_file(changed[kind], path)
        with pytest.raises(MalformedFile, match=r"teacher\.safetensors"):
            Cache(path, TARGETS, VOCABULARY)

    @pytest.mark.parametrize("token", [-1, VOCABULARY])
    def test_no_token(self, tmp_path: Path, token: int) -> None:
        """An id that no token has is an error, and not read past the end of the student's logits."""
        path = tmp_path / "teacher.safetensors"
        build(path, Asked())
        tensors = load_file(path)
        tensors["ids"][4, 1] = token
        save_file(tensors, path)
        cache = Cache(path, TARGETS, VOCABULARY)
        cache.rows(torch.tensor([0]))
        with pytest.raises(MalformedFile, match=r"`ids` in .*teacher\.safetensors: the id of no token"):
            cache.rows(torch.tensor([2]))
