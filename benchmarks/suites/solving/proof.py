"""What GPTQ makes of every linear of nano-K2, and of the whole model, beside rounding and `imatrix`.

The first half's arms are taken as they are (`suites.calib.proof`): models, draws, test, truth, `rtn` and `imatrix`. One
file for each model and draw in `WORKDIR/solving-proof`; what is there is taken.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from k2quant.calib.inputs import Samples
from k2quant.calib.solving.choosing import Settled
from k2quant.calib.solving.settings import Settings
from k2quant.eval import measure_fidelity
from k2quant.model.generation import silence
from k2quant.nano import tasks
from k2quant.nano.scoring import score
from suites.calib import drift, rounding, samples, truth
from suites.calib import proof as first_half
from suites.calib.samples import DRAWS, SEEDS, WIDTHS, tell
from suites.calib.summing import mean
from suites.solving import passes

GPTQ = "gptq"
"""As `convert` has it: each matrix sees what the quantised ones before it give."""
ALONE = "gptq alone"
"""Each matrix sees what the original model gives it, so that it is solved for what its true error is measured on."""
QAT_EXAM = 100
"""Questions of each family and level in the exam of `benchmarks/qat.py`, 1,800 in all."""

SHIPPED = 4
"""Bits of what a checkpoint has."""
_TOKENS = 1 << 17  # more than any test has

Solutions = Mapping[tuple[str, int], Mapping[str, Settled]]
"""By method and bits, then by base."""


def solutions(folder: Path, given: Samples, bases: Sequence[str], widths: Sequence[int] = WIDTHS) -> Solutions:
    """Solve a model in both ways at each width."""
    return {
        (method, bits): passes.solved(folder, given, bases, Settings(bits=bits, propagate=method == GPTQ))
        for bits in widths
        for method in (GPTQ, ALONE)
    }


def errors(
    model: Any, seen: truth.Seen, found: Solutions, before: Sequence[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield the first half's rows with the true errors of GPTQ, over those of `rtn`, and what was said of them."""
    matrices = truth.matrices(model)
    for row in before:
        base, bits = row["base"], row["bits"]
        here, matrix = seen.of(base), matrices[base]
        if here is None:
            continue
        plain = here.error(matrix, rounding.rounded(matrix, "rtn", bits))
        own = {method: found[method, bits][base] for method in (GPTQ, ALONE)}
        true = {method: here.error(matrix, each.values.float()) / plain for method, each in own.items()}
        said = own[ALONE].facts
        yield {
            "base": base,
            "kind": row["kind"],
            "bits": bits,
            "tokens": row["tokens"],
            "true": {method: row["true"][method] for method in rounding.METHODS} | true,
            "ships": said["method"],
            "judged": said["relative"],
            "saturated": said["saturated"],
        }


def examined(model: Any, draw: int) -> dict[str, float]:
    """Return loss and share of right answers on QAT's exam; of the first draw alone, as QAT has one."""
    if draw != DRAWS[0]:
        return {}
    found = score(model, tasks.exam(QAT_EXAM))
    return {"loss": mean(found.losses), "exam": mean(map(int, found.right))}


def drifts(
    workdir: Path, tested: first_half.Tested, seed: int, draw: int, found: Solutions, before: Sequence[Any]
) -> Iterator[dict[str, Any]]:
    """Yield the first half's rows and one for each way and width of GPTQ: KL and answers, and what QAT's exam says."""
    stats = first_half.calibrated(workdir, tested.folder, seed, draw)
    for row in before:
        model = tested.model
        if row["method"] != "none" and draw == DRAWS[0]:
            model = rounding.rounded_model(tested.model, stats, row["method"], row["bits"])
        yield row | examined(model, draw)
    for (method, bits), values in found.items():
        model = passes.with_values(tested.model, values)
        seen = drift.predicted(model, tested.items)
        row = {"method": method, "bits": bits, "kl": drift.divergence(tested.base, seen), "right": seen.right}
        yield row | examined(model, draw)


def as_written(workdir: Path, tested: first_half.Tested, seed: int, draw: int, found: Solutions) -> dict[str, Any]:
    """Return how many matrices of the checkpoint that `solve` writes have the values settled here, and its fidelity.

    It is measured with the first model's first draw alone.
    """
    if (seed, draw) != (SEEDS[0], DRAWS[0]):
        return {}
    text = samples.write_tested(workdir / "data" / "test.jsonl")
    with tempfile.TemporaryDirectory() as place:
        destination = Path(place) / "int4"
        values = passes.written(tested.folder, passes.data_of(workdir, seed, draw), destination)
        said = measure_fidelity(
            tested.folder, destination, text=text, context=samples.LONGEST, tokens=_TOKENS, dtype="float32"
        )
    own = found[GPTQ, SHIPPED]
    equal = sum(torch.equal(values[base], each.values.float()) for base, each in own.items())
    return {"written": {"equal": equal, "of": len(own), "fidelity": said.kl.value}}


def arm(
    workdir: Path, tested: first_half.Tested, seed: int, draw: int, widths: Sequence[int] = WIDTHS
) -> dict[str, Any]:
    """Return what is measured of one model and one draw."""
    tell(f"solving, proof: seed {seed}, draw {draw}")
    (before,) = first_half.of_seed(workdir, tested.folder, seed, (draw,))
    rows = [row for row in before["rows"] if row["bits"] in widths]
    given = passes.read(workdir, tested.folder, seed, draw)
    found = solutions(tested.folder, given, list(truth.matrices(tested.model)), widths)
    kept = [row for row in before["drift"] if row["bits"] in {16, *widths} and row["method"] != "mse"]
    return {
        "seed": seed,
        "draw": draw,
        "digests": {name: part.digest for name, part in given.parts.items()},
        "rows": list(errors(tested.model, tested.seen, found, rows)),
        "drift": list(drifts(workdir, tested, seed, draw, found, kept)),
        **as_written(workdir, tested, seed, draw, found),
    }


def of_seed(workdir: Path, folder: Path, seed: int, draws: Sequence[int]) -> list[dict[str, Any]]:
    """Return the arms of one model."""
    tested: first_half.Tested | None = None
    found = []
    for draw in draws:
        path = workdir / "solving-proof" / f"{seed}-{draw}.json"
        if not path.exists():
            tested = tested or first_half.Tested(folder, samples.exam())
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(arm(workdir, tested, seed, draw)))
            partial.rename(path)
        found.append(json.loads(path.read_text()))
    return found


def measure(
    workdir: Path, seeds: Sequence[int] = SEEDS, draws: Sequence[int] = DRAWS, at_once: int = 1
) -> list[dict[str, Any]]:
    """Return all arms; so many models are measured at once, each in a process with one thread of torch."""
    folders = samples.bases(workdir, seeds)
    with ProcessPoolExecutor(at_once, multiprocessing.get_context("spawn"), _begin) as pool:
        found = [pool.submit(of_seed, workdir, folders[seed], seed, draws) for seed in seeds]
        return [one for arms in found for one in arms.result()]


def _begin() -> None:
    silence()
    torch.set_num_threads(1)
