"""The proof of calibration: its truth is the truth, its claims need intervals, and its pages are what results say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from k2quant.nano import architecture, tasks
from k2quant.nano.batches import tokens_of
from k2quant.nano.scoring import score
from places import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from suites.calib import drift, rounding, run, samples, summing, truth
from suites.calib.peers import worker
from suites.calib.rounding import Known

RESULTS = ROOT / "benchmarks" / "results"
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "kv_lora_rank": 32,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_hidden_layers": 2,
    "q_lora_rank": 32,
}
"""What is smaller here than in nano-K2."""
EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def model() -> Any:
    """A smaller nano-K2 with random weights whose values are BF16."""
    torch.manual_seed(0)
    return architecture.build(architecture.CONFIG | SMALL).bfloat16().float().eval()


@pytest.fixture(scope="module")
def seen(model: Any) -> truth.Seen:
    """What went into its matrices, of 36 items."""
    return truth.seen(model, tasks.exam(2))


def test_the_error_is_that_of_the_outputs() -> None:
    """The error from second moments is the sum of w |(W - Q) x|^2, token by token."""
    generator = torch.Generator().manual_seed(1)
    x, weights = torch.randn(50, 32, generator=generator), torch.rand(50, generator=generator)
    before, after = torch.randn(2, 8, 32, generator=generator)
    moments = truth.Moments.of(32)
    moments.add(x[:20], weights[:20])
    moments.add(x[20:], weights[20:])
    expected = (weights * (x @ (before - after).T).double().square().sum(1)).sum()
    assert moments.error(before, after) == pytest.approx(float(expected), rel=1e-5)
    assert moments.tokens == 50


def test_every_token_is_seen_once_by_each_of_its_experts(model: Any, seen: truth.Seen) -> None:
    """Padding is not counted, a token has four experts, and gate and up have one input."""
    tokens = sum(len(tokens_of(item)[0]) for item in tasks.exam(2))
    bases = truth.matrices(model)
    assert len(bases) == 2 * 5 + 3 + (3 + 8 * 3)
    assert {seen.inputs[base].tokens for base in bases if base in seen.inputs and ".experts." not in base} == {tokens}
    experts = [seen.of(f"{EXPERTS}.{expert}.up_proj") for expert in range(8)]
    assert sum(one.tokens if one else 0 for one in experts) == 4 * tokens
    assert seen.layer_wide(f"{EXPERTS}.3.gate_proj").tokens == tokens


def test_an_expert_is_weighted_by_its_share(model: Any) -> None:
    """The moments of one expert's down projection are those of its own intermediate, weighted by p^2."""
    items, caught = tasks.exam(1), []
    hook = model.model.layers[1].mlp.experts.register_forward_pre_hook(lambda _, given: caught.append(given))
    found = truth.seen(model, items).of(f"{EXPERTS}.5.down_proj")
    hook.remove()
    (x, ids, shares), experts = caught[0], model.model.layers[1].mlp.experts
    rows = [tokens_of(item)[0] for item in items]
    real = torch.cat([torch.arange(max(map(len, rows))) < len(row) for row in rows])
    expected = torch.zeros(experts.down_proj.shape[-1], dtype=torch.float64)
    for token, chosen, share in zip(x[real], ids[real], shares[real], strict=True):
        if 5 in chosen.tolist():
            gate, up = (experts.gate_up_proj[5] @ token).chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            expected += float(share[chosen == 5]) ** 2 * inner.detach().double() ** 2
    assert found is not None
    torch.testing.assert_close(found.second.diagonal(), expected, rtol=1e-4, atol=1e-9)


def test_answers_are_those_of_the_exam(model: Any) -> None:
    """Right answers are the ones that nano's own scoring finds, and a model has no divergence from itself."""
    items = tasks.exam(1)
    found = drift.predicted(model, items)
    assert found.right == "".join("01"[good] for good in score(model, items).right)
    assert drift.divergence(found, found) == 0
    rounded = rounding.rounded_model(model, None, "rtn", 2)
    assert drift.divergence(found, drift.predicted(rounded, items)) > 0


def test_each_method_is_best_by_its_own_measure(model: Any, seen: truth.Seen) -> None:
    """`mse` has the least squared error, and with what is known of the columns `imatrix` has less than it expected."""
    base = "model.layers.1.mlp.shared_experts.down_proj"
    matrix, moments = truth.matrices(model)[base], seen.of(base)
    assert moments is not None
    known = Known(moments.mean_square.float().numpy(), (moments.first / moments.weight).float().numpy())
    values = {method: rounding.rounded(matrix, method, 3, known) for method in rounding.METHODS}
    square = {method: float((matrix - each).square().sum()) for method, each in values.items()}
    assert min(square, key=lambda method: square[method]) == "mse"
    assert moments.error(matrix, values["imatrix"]) < moments.error(matrix, values["rtn"])


def arms(gain: list[float], kl: list[float]) -> list[dict[str, Any]]:
    """Return made-up arms of three models: the second method is better by so much, in errors and in KL."""
    return [
        {
            "seed": seed,
            "draw": draw,
            "fingerprint": "",
            "rows": [
                {
                    "kind": "o",
                    "bits": 4,
                    "true": {"rtn": 1.0, "mse": 0.9, "imatrix": 0.9 - gain[seed] * sign},
                    "judged": {"rtn": 1.0, "mse": 0.9, "imatrix": 0.8},
                }
                for sign in (1, 1, 1, -1)
            ],
            "drift": [
                {"method": "rtn", "bits": 4, "kl": 0.1, "right": "0011"},
                {"method": "mse", "bits": 4, "kl": 0.1 * kl[seed], "right": "0111"},
                {"method": "imatrix", "bits": 4, "kl": 0.05, "right": "0111"},
            ],
        }
        for seed in range(3)
        for draw in range(2)
    ]


def test_nothing_is_claimed_whose_interval_holds_no_difference() -> None:
    """A ratio that models disagree about is no claim, one on which they agree is; so it is with answers."""
    unsure, sure = (
        next(iter(summing.differences(arms([0.1] * 3, kl), (4,)))) for kl in ([0.5, 1.5, 1.0], [0.5, 0.52, 0.51])
    )
    assert not unsure["kl_claimed"]
    assert sure["kl_claimed"]
    assert sure["kl"]["mean"] == pytest.approx(0.51, abs=0.001)
    assert sure["answers"]["gained"] == 3
    assert sure["answers"]["lost"] == 0


def test_shares_count_linears_and_judgements() -> None:
    """Three of four linears win: the bar of 95% is missed, and the judgement that sees four is wrong once in four."""
    made = arms([0.05] * 3, [1.0] * 3)
    found = list(summing.shares(made, (4,)))
    assert [row["share"]["mean"] for row in found] == [1.0, 0.75, 1.0]
    assert [bar["met"] for bar in summing.bars(found)] == [True, False]
    wrong = {(row["worse"], row["better"]): row["wrong"] / row["count"] for row in summing.judgement(made, (4,))}
    assert wrong == {("rtn", "mse"): 0, ("mse", "imatrix"): 0.25, ("rtn", "imatrix"): 0}


def test_a_block_of_q4_0_is_read_as_llama_cpp_writes_it() -> None:
    """The first half of a block lies in the lower nibbles, and codes are less 8."""
    block = np.zeros((1, 1, worker.Q4_0_BYTES), np.uint8)
    block[0, 0, :2] = np.frombuffer(np.float16(0.5).tobytes(), np.uint8)
    block[0, 0, 2] = 0xF1  # column 0 has the code 1, column 16 has 15
    values = worker.decoded(block)[0, 0]
    assert values[[0, 16, 1]].tolist() == [-3.5, 3.5, -4.0]


def test_draws_do_not_meet(tmp_path: Path) -> None:
    """No two draws begin alike, and no tested question stands in any of them."""
    draws = [
        samples.write_draw(tmp_path / f"{seed}-{draw}", seed, draw, 50).read_text()
        for seed in (0, 1)
        for draw in (0, 1)
    ]
    assert len(set(draws)) == 4
    questions = {json.loads(line)["prompt"] for text in draws for line in text.splitlines()}
    assert questions.isdisjoint(item.question for item in samples.exam(5))


@pytest.mark.parametrize("path", sorted(RESULTS.glob("calib-*.json")), ids=lambda path: path.stem)
def test_the_page_is_what_its_results_say(path: Path) -> None:
    """Written anew from the committed results, a page is the committed one."""
    _, page = run.PARTS[path.stem.removeprefix("calib-")]
    assert page(json.loads(path.read_text())) == path.with_suffix(".md").read_text()
