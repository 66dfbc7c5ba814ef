"""The output error of every linear of nano-K2, by each method and width: true, on held-out activations, and as judged.

One file for each model and draw in `WORKDIR/proof`; what is there is taken.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from k2quant.calib.stats.reading import Stats, open_stats
from k2quant.ground import names
from k2quant.nano.tasks import Item
from suites.calib import drift, rounding, samples, truth
from suites.calib.samples import DRAWS, SEEDS, WIDTHS, tell

LENGTH = 64
"""Tokens of a row: two to four documents, which do not see one another."""


def calibrated(workdir: Path, folder: Path, seed: int, draw: int, documents: int = samples.DOCUMENTS) -> Stats:
    """Return what `k2quant calibrate` measures of a model on one draw; it is measured if it is not there yet."""
    from k2quant.calib import calibrate

    stats = workdir / "stats" / f"{seed}-{draw}"
    if not (stats / "k2quant_stats.json").exists():
        data = samples.write_draw(workdir / "data" / f"{seed}-{draw}.jsonl", seed, draw, documents)
        calibrate(folder, stats, data=str(data), samples=documents, length=LENGTH)
    return open_stats(stats)


def kind(base: str) -> str:
    """Return which linears of a model are alike, such as `experts' gate` or `kv_b`."""
    projection = base.rpartition(".")[2].removesuffix("_with_mqa").removesuffix("_proj")
    if names.is_routed_expert(base):
        return f"experts' {projection}"
    mlp = {".shared_experts.": "shared", ".mlp.": "dense"}
    where = next((word for part, word in mlp.items() if part in base), "")
    return f"{where} {projection}".strip()


def errors(model: Any, stats: Stats, test: truth.Seen, widths: Sequence[int] = WIDTHS) -> Iterator[dict[str, Any]]:
    """Yield a row for each linear that the test reaches, and each width.

    "true" is sum w |(W - Q) x|^2 of each method over that of `rtn`; "judged" is the same by the mean squares
    and means of the validation part, as rule 6 sees it.
    """
    for base, matrix in truth.matrices(model).items():
        here, held, own = test.of(base), stats.held_out(base), stats.moments(base)
        if here is None or held is None or own is None:
            continue
        weights, known = rounding.bits_of(matrix), rounding.Known.of(stats, base)
        for bits in widths:
            found = {method: rounding.scales(weights, method, bits, known) for method in rounding.METHODS}
            true = {
                method: here.error(matrix, rounding.values(weights, scale, bits)) for method, scale in found.items()
            }
            judged = rounding.judged(weights, found, held, bits)
            yield {
                "base": base,
                "kind": kind(base),
                "bits": bits,
                "tokens": {"train": own.tokens, "validation": held.tokens, "test": here.tokens},
                "true": {method: true[method] / true["rtn"] for method in rounding.METHODS},
                "judged": {method: judged[method] / judged["rtn"] for method in rounding.METHODS},
            }


class Tested:
    """A model, and what its test says of it before anything is rounded."""

    def __init__(self, folder: Path, items: Sequence[Item]) -> None:
        """Run the test through it."""
        self.folder, self.items, self.model = folder, items, truth.load(folder)
        self.seen, self.base = truth.seen(self.model, items), drift.predicted(self.model, items)


def arm(workdir: Path, tested: Tested, seed: int, draw: int) -> dict[str, Any]:
    """Return what is measured of one model and one draw; what needs no data is measured with the first."""
    tell(f"proof: seed {seed}, draw {draw}")
    stats = calibrated(workdir, tested.folder, seed, draw)
    methods = rounding.METHODS if draw == DRAWS[0] else ("imatrix",)
    return {
        "seed": seed,
        "draw": draw,
        "fingerprint": stats.fingerprint,
        "rows": list(errors(tested.model, stats, tested.seen)),
        "drift": list(drift.measure(workdir, tested.folder, tested.model, tested.base, stats, methods, tested.items)),
    }


def of_seed(workdir: Path, folder: Path, seed: int, draws: Sequence[int] = DRAWS) -> list[dict[str, Any]]:
    """Return the arms of one model."""
    paths = {draw: workdir / "proof" / f"{seed}-{draw}.json" for draw in draws}
    wanted = [draw for draw, path in paths.items() if not path.exists()]
    if wanted:
        tested = Tested(folder, samples.exam())
        for draw in wanted:
            paths[draw].parent.mkdir(parents=True, exist_ok=True)
            partial = paths[draw].with_suffix(".partial")
            partial.write_text(json.dumps(arm(workdir, tested, seed, draw)))
            partial.rename(paths[draw])
    return [json.loads(path.read_text()) for path in paths.values()]


def measure(workdir: Path, seeds: Sequence[int] = SEEDS, draws: Sequence[int] = DRAWS) -> list[dict[str, Any]]:
    """Return all arms."""
    folders = samples.bases(workdir, seeds)
    return [one for seed in seeds for one in of_seed(workdir, folders[seed], seed, draws)]
