"""What is measured, against a loop by hand over transformers' model in float32, one text after another."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from k2quant.calib.collecting import collect
from k2quant.calib.collecting.memory import needs
from k2quant.calib.collecting.moments import Hessian, Moments
from k2quant.calib.inputs import Part, Samples
from k2quant.calib.stats.layout import PARTS
from k2quant.calib.stats.reading import Stats, open_stats
from k2quant.checkpoint.reader import open_checkpoint
from k2quant.conversion.convert import convert
from k2quant.model import LayerHooks, load_model, stream_forward
from k2quant.model.passes.activations import Activations

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH = 24
PLENTY = 4 * 10**9  # bytes: enough for any test
VOCABULARY = 2048
Contents = Callable[[Path], dict[str, bytes]]


@pytest.fixture(scope="module")
def measured(k2_bf16: Path, tmp_path_factory: pytest.TempPathFactory, drawn: Callable[..., Samples]) -> Path:
    """Statistics of the small K2 in BF16, with Hessians."""
    folder = tmp_path_factory.mktemp("stats") / "STATS"
    collect(open_checkpoint(k2_bf16), folder, drawn(VOCABULARY), memory=PLENTY, hessians=True)
    return folder


Seen = dict[str, list[tuple[Tensor, Tensor]]]
"""Of each matrix: what it multiplies, `[M, K]`, and how much each row counts."""


def far(found: Any, wanted: Any) -> float:
    """Return how far apart two arrays are, relative to the second."""
    return float(np.linalg.norm(np.asarray(found) - np.asarray(wanted)) / np.linalg.norm(np.asarray(wanted)))


def assert_same(stats: Stats, base: str, part: Any, seen: Seen) -> None:
    """Compare the statistics of a matrix with what it multiplied."""
    found = stats.moments(base, part)
    assert found is not None
    x = torch.cat([values for values, _ in seen[base]]).double()
    w = torch.cat([weights[: len(values)] for values, weights in seen[base]]).double()
    assert abs(found.tokens - len(x)) <= (2 if ".experts." in base else 0)  # BF16 sends a token elsewhere now and then
    assert found.weight == pytest.approx(float(w.sum()), rel=0.02)
    assert found.largest == pytest.approx(float(x.abs().max()), rel=0.05)
    wanted = (w @ x**2) / w.sum()
    assert far(found.mean_square, wanted) < 0.03
    assert np.linalg.norm(found.mean - ((w @ x) / w.sum()).numpy()) < 0.05 * float(wanted.sum()) ** 0.5
    hessian = stats.hessian(base, part)
    assert hessian is not None
    product = ((x * w[:, None]).T @ x / w.sum()).numpy()
    assert np.array_equal(hessian, hessian.T)
    assert far(hessian, product) < 0.08  # more of it is noise: K^2 figures of some tokens
    assert np.allclose(hessian.diagonal(), found.mean_square, rtol=1e-4)


def test_every_matrix_is_measured_as_by_hand(
    measured: Path, k2_bf16: Path, drawn: Callable[..., Samples], by_hand: Callable[[Any, Part], Seen]
) -> None:
    """Of each matrix and part: tokens without padding, of texts that do not see one another; p^2 weighs experts'."""
    stats = open_stats(measured)
    bases = [name.removesuffix(".weight") for name in open_checkpoint(k2_bf16).tensors if "_proj" in name]
    for part in PARTS:
        seen = by_hand(load_model(k2_bf16, dtype="float32"), getattr(drawn(VOCABULARY), part))
        for base in bases:
            if base in seen:
                assert_same(stats, base, part, seen)
                continue
            unseen = stats.moments(base, part)  # a routed expert that no token reaches
            assert ".experts." in base
            assert unseen is not None
            assert (unseen.tokens, unseen.weight, unseen.largest, float(unseen.mean_square.max())) == (0, 0, 0, 0)
        for layer in (1, 2):
            name = f"model.layers.{layer}.mlp.experts"
            prior = stats.layer_moments(f"{name}.0.gate_proj", part)
            assert prior is not None
            wanted = torch.cat([values for values, _ in seen[name]]).double().square().mean(0)
            assert prior.tokens == getattr(drawn(VOCABULARY), part).count
            assert far(prior.mean_square, wanted) < 0.03
    assert any(".experts." in base and base not in seen for base in bases)


@pytest.mark.parametrize("layout", ["k2_source", "k25", "k2_mixed"])
def test_equal_values_give_equal_statistics(
    layout: str, request: pytest.FixtureRequest, tmp_path: Path, drawn: Callable[..., Samples], contents: Contents
) -> None:
    """FP8, INT4 below K2.5's names, both side by side: bit for bit those of the checkpoint converted to BF16."""
    path = request.getfixturevalue(layout)
    plain = convert(path, tmp_path / "bf16", to="bf16").folder
    for name, folder in (("own", path), ("bf16", plain)):
        collect(open_checkpoint(folder), tmp_path / f"{name} stats", drawn(VOCABULARY), memory=PLENTY)
    own, other = (contents(tmp_path / f"{name} stats") for name in ("own", "bf16"))
    moments = [name for name in own if name.endswith(".safetensors")]
    assert len(moments) == 3
    assert all(own[name] == other[name] for name in moments)


class Note(LayerHooks):
    """Notes what goes into each layer."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.inputs: dict[int, list[Tensor]] = defaultdict(list)

    def batch(self, layer: int, number: int, inputs: Tensor, outputs: Tensor) -> None:
        """Note it."""
        del number, outputs
        self.inputs[layer].append(inputs.float())


def test_hidden_states_are_those_of_a_plain_pass(
    k2_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn: Callable[..., Samples]
) -> None:
    """What goes into each layer is as near to that of a pass in float32 as `stream_forward` has it in BF16."""
    found: dict[int, list[Tensor]] = defaultdict(list)
    put = Activations.put

    def noted(self: Activations, stage: int, batch: int, value: Tensor) -> None:
        found[stage].append(value.float())
        put(self, stage, batch, value)

    data = drawn(VOCABULARY)
    batches = [{"input_ids": part.tokens, "position_ids": part.positions} for part in (data.train, data.validation)]
    plain, exact = Note(), Note()
    list(stream_forward(k2_source, batches, plain))
    list(stream_forward(k2_source, batches, exact, dtype="float32", backend="decoded"))
    monkeypatch.setattr(Activations, "put", noted)
    collect(open_checkpoint(k2_source), tmp_path / "STATS", data, memory=PLENTY)
    assert found.keys() == plain.inputs.keys() == {0, 1, 2}
    for layer, own in found.items():
        mine, theirs, true = (torch.cat(each) for each in (own, plain.inputs[layer], exact.inputs[layer]))
        assert (mine - true).norm() <= 1.1 * (theirs - true).norm() < 0.03 * true.norm()


def test_moments_by_hand() -> None:
    """Sums of squares, weights, tokens and the largest value are those of a loop in float64, block after block."""
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(700, 96, generator=draw).bfloat16() * torch.logspace(-3, 3, 96)
    x = x.bfloat16()
    w = torch.rand(700, generator=draw)
    sums, hessian = Moments(96, 2, torch.device("cpu")), Hessian(96, torch.device("cpu"))
    for start in range(0, 700, 256):
        sums.add(x[start : start + 256], w[start : start + 256], expert=1)
        hessian.add(x[start : start + 256], w[start : start + 256])
    found, exact = sums.measured(), x.double()
    wanted = (w.double() @ exact**2 / w.double().sum()).numpy()
    assert np.allclose(found.mean_square[1], wanted, rtol=1e-5)
    assert np.allclose(
        found.mean[1], (w.double() @ exact / w.double().sum()).numpy(), rtol=1e-4, atol=1e-6 * wanted**0.5
    )
    assert not found.mean_square[0].any()
    assert not found.mean[0].any()
    assert np.asarray(found.tokens).tolist() == [0, 700]
    assert np.asarray(found.largest).tolist() == [0, float(exact.abs().max())]
    mean = hessian.mean(float(w.double().sum()))
    assert np.array_equal(mean, mean.T)
    whole = ((exact * w.double()[:, None]).T @ exact / w.double().sum()).numpy()
    assert np.allclose(mean, whole, rtol=1e-4, atol=1e-5 * np.sqrt(np.outer(wanted, wanted)))


def test_one_token_counts_as_what_it_is() -> None:
    """A single token of weight w gives E[x] = x and E[x^2] = x^2, whatever w."""
    sums = Moments(2, None, torch.device("cpu"))
    sums.add(torch.tensor([[3.0, -4.0]]), torch.tensor([1e-6]))
    assert sums.measured().mean_square.tolist() == pytest.approx([9.0, 16.0])
    assert sums.measured().mean.tolist() == pytest.approx([3.0, -4.0])
    assert float(sums.measured().largest) == 4.0


def test_needs_follow_from_the_shapes(k2_bf16: Path) -> None:
    """Hidden states are tokens times H in BF16; more memory means more experts, fewer waves, more of them kept."""
    source = open_checkpoint(k2_bf16)
    plenty = needs(source, rows=[12, 4], length=LENGTH, memory=PLENTY)
    assert plenty.hidden == 16 * LENGTH * 512 * 2
    assert (plenty.chunk, plenty.wave) == (16, 1)
    least = needs(source, rows=[12, 4], length=LENGTH, memory=plenty.least)
    assert (least.chunk, least.wave, least.least) == (1, 1, plenty.least)
