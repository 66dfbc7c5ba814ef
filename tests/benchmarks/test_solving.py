"""The proof of GPTQ: its figures are the pass's, its claims need intervals, and its pages are what results say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from k2quant.nano import tasks
from places import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from suites.calib import drift, rounding, samples, truth
from suites.solving import passes, proof, run, summing
from suites.solving.peers import beside

pytestmark = pytest.mark.usefixtures("one_thread")

RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = 40
BITS = 4


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a smaller nano-K2 of random weights, and a draw of documents."""
    place = tmp_path_factory.mktemp("solving")
    (place / "seed-0").mkdir()
    tiny.write_model(place / "seed-0")
    samples.write_draw(place / "data" / "0-0.jsonl", 0, 0, DOCUMENTS)
    return place


@pytest.fixture(scope="module")
def model(workdir: Path) -> Any:
    """The model in memory."""
    return truth.load(workdir / "seed-0")


@pytest.fixture(scope="module")
def found(workdir: Path, model: Any) -> proof.Solutions:
    """What the pass makes of it, in both ways."""
    given = passes.read(workdir, workdir / "seed-0", 0, 0, DOCUMENTS)
    return proof.solutions(workdir / "seed-0", given, list(truth.matrices(model)), (BITS,))


def test_each_linear_is_solved_and_loses_less_than_rounding(model: Any, found: proof.Solutions) -> None:
    """Both ways settle every matrix, and the true error of most lies far below that of rounding."""
    items = tasks.exam(2)
    seen, matrices = truth.seen(model, items), truth.matrices(model)
    before = [
        {"base": base, "kind": "o", "bits": BITS, "tokens": {}, "true": dict.fromkeys(rounding.METHODS, 1.0)}
        for base in matrices
        if seen.of(base)
    ]
    rows = list(proof.errors(model, seen, found, before))
    assert {row["base"] for row in rows} == {row["base"] for row in before}
    for method in (proof.GPTQ, proof.ALONE):
        assert found[method, BITS].keys() == matrices.keys()
        assert sorted(row["true"][method] for row in rows)[len(rows) // 2] < 0.7


def test_a_whole_model_has_the_matrices_that_were_settled(model: Any, found: proof.Solutions) -> None:
    """Every projection is replaced, nothing else is, and the original model stays what it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = passes.with_values(model, found[proof.GPTQ, BITS])
    for base, matrix in truth.matrices(made).items():
        assert torch.equal(matrix, found[proof.GPTQ, BITS][base].values.float())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(made.lm_head.weight, model.lm_head.weight)


def test_the_checkpoint_has_what_was_settled(workdir: Path, found: proof.Solutions, tmp_path: Path) -> None:
    """What `k2quant.calib.solve` writes of a draw is what the pass settles, to the last bit."""
    folder, data = workdir / "seed-0", workdir / "data" / "0-0.jsonl"
    values = passes.written(folder, data, tmp_path / "int4", DOCUMENTS)
    settled = found[proof.GPTQ, BITS]
    assert settled.keys() == values.keys()
    assert all(torch.equal(values[base], each.values.float()) for base, each in settled.items())


def test_propagation_is_what_tells_the_two_ways_apart(found: proof.Solutions) -> None:
    """The first matrix sees the same either way; behind it the default sees what was quantised."""
    default, alone = (found[method, BITS] for method in (proof.GPTQ, proof.ALONE))
    first, last = "model.layers.0.self_attn.q_a_proj", "model.layers.1.self_attn.q_a_proj"
    assert torch.equal(default[first].values, alone[first].values)
    assert not torch.equal(default[last].values, alone[last].values)


def test_the_pass_is_given_what_calibrate_reads(workdir: Path) -> None:
    """Documents of a draw lie in three parts, and each is found again as peers get it: whole, in order, none twice."""
    given = passes.read(workdir, workdir / "seed-0", 0, 0, DOCUMENTS)
    texts = beside.documents(given)
    assert len(texts) >= len(given.train.hashes)
    assert torch.equal(torch.cat(texts), given.train.tokens[given.train.real])
    assert {int(text[0]) for text in texts} == {int(given.train.tokens[0, 0])}


def test_the_verdict_is_the_gates() -> None:
    """No change in many answers passes, many losses fail, and none in few answers says nothing."""
    assert summing.verdict("1" * 160, "1" * 160) == "PASS"
    assert summing.verdict("1" * 60, "1" * 40 + "0" * 20) == "FAIL"
    assert summing.verdict("1" * 10, "1" * 10) == "INCONCLUSIVE"


def test_what_was_folded_is_held_against_the_original_weights() -> None:
    """Scales that were moved between matrices are taken out again, and what is left is what rounding did."""
    generator = torch.Generator().manual_seed(0)
    before, off = torch.randn(2, 8, 32, generator=generator)
    columns = torch.rand(32, generator=generator) + 0.5
    folded = before * columns
    after = folded + 0.01 * off * columns
    torch.testing.assert_close(beside.unfolded(before, after, folded), before + 0.01 * off)
    assert torch.equal(beside.unfolded(before, after, None), after)
    assert beside.codes(torch.tensor([[-1.0, 0.0, 1.0, 0.0] * 8])) == 3


def test_a_contestants_weights_are_put_where_they_belong(model: Any) -> None:
    """Experts go into their stacks, norms and routers into the model; what is the model's own leaves it unchanged."""
    same = {f"{base}.weight": matrix.clone() for base, matrix in truth.matrices(model).items()}
    same |= {name: value.clone() for name, value in model.state_dict().items() if "norm" in name}
    items = tasks.exam(1)
    base = drift.predicted(model, items)
    assert drift.divergence(base, drift.predicted(beside.whole(model, same), items)) == 0
    same["model.norm.weight"] = same["model.norm.weight"] * 2
    assert torch.equal(beside.whole(model, same).model.norm.weight, 2 * model.model.norm.weight)


def test_each_kind_of_answer_is_from_its_own_exam(model: Any) -> None:
    """QAT's exam is asked with a model's first draw alone, and says what nano's own scoring does."""
    assert proof.examined(model, samples.DRAWS[1]) == {}
    assert len(tasks.exam(proof.QAT_EXAM)) == 18 * proof.QAT_EXAM


def arms(kl: list[float]) -> list[dict[str, Any]]:
    """Return made-up arms of as many models: GPTQ has this KL, of 0.1 that rounding has."""

    def row(method: str, bits: int, kl: float, loss: float) -> dict[str, Any]:
        return {"method": method, "bits": bits, "kl": kl, "right": "0111", "loss": loss, "exam": 0.5}

    return [
        {
            "seed": seed,
            "draw": draw,
            "rows": [
                {
                    "kind": "o",
                    "bits": 3,
                    "true": {"rtn": 1.0, "mse": 0.9, "imatrix": 0.8, proof.GPTQ: 0.5, proof.ALONE: 0.4 + sign},
                    "ships": "gptq",
                    "judged": 0.4,
                    "saturated": 0.01,
                }
                for sign in (0, 0, 0, 1)
            ],
            "drift": [
                row("none", 16, 0.0, 0.1),
                *([row("rtn", 3, 0.1, 0.3)] if draw == 0 else []),
                row("imatrix", 3, 0.07, 0.2),
                row(proof.GPTQ, 3, each, 0.15),
                row(proof.ALONE, 3, each, 0.15),
            ],
        }
        for seed, each in enumerate(kl)
        for draw in range(2)
    ]


def test_the_bars_are_held_by_lower_bounds() -> None:
    """Three of four linears are below the bar of 95%; a mean of what comes back is not enough where models disagree."""
    sure, unsure = (summing.summary(arms(kl), (3,)) for kl in ([0.02, 0.021, 0.019], [0.001, 0.001, 0.1]))
    assert [bar["met"] for bar in sure["bars"]] == [False, True]
    assert [bar["met"] for bar in unsure["bars"]] == [False, False]
    assert sure["shipped"][0]["above"] == 6
    recovered = {row["method"]: row["recovered"] for row in sure["qat"]}
    assert recovered[proof.GPTQ]["mean"] == pytest.approx(0.75)
    assert recovered["imatrix"]["mean"] == pytest.approx(0.5)


def test_every_better_figure_of_a_peer_is_told() -> None:
    """A peer that is closer but slower is told of as closer; rounding is held against rounding."""

    def row(name: str, kl: float, seconds: float) -> dict[str, Any]:
        spent = {"seconds": seconds, "whole": seconds, "cpu": seconds, "own": 1}
        return {"contestant": name, "bits": 4, "kl": kl, "true": {"a": kl}, "right": "01", "codes": 16, **spent}

    rows = [
        each | {"seed": seed}
        for seed in range(2)
        for each in (row("rtn", 4, 1), row("gptq", 1, 5), row("peer rtn", 5, 2), row("peer gptq", 0.5, 9))
    ]
    levels = list(beside.levels(rows))
    assert [each["ratio"][0] if each["ratio"] else None for each in levels] == pytest.approx([4, None, 5, 0.5])
    assert [each["left"] for each in levels] == [None, 0.25, None, 0.1]
    told = beside.losses(levels)
    assert [line.split(":")[0] for line in told] == ["INT4, llm-compressor GPTQ"] * 2
    assert "KL 0.50000, k2quant's gptq 1.00000" in told[0]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("solving-*.json")), ids=lambda path: path.stem)
def test_the_page_is_what_its_results_say(path: Path) -> None:
    """Written anew from the committed results, a page is the committed one."""
    _, page = run.PARTS[path.stem.removeprefix("solving-")]
    assert page(json.loads(path.read_text())) == path.with_suffix(".md").read_text()
