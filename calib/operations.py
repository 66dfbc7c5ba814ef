"""What solving takes, counted in operations, and how many of them this machine does in a second.

The real kernels are measured, as many at a time as there will be workers, on matrices of 2,048 columns. Those of 7,168
are faster an operation, so what is planned by this is rather too long: a factor does 11, 17 and 23 billion a second on
one core with 1,024, 2,048 and 4,096 columns, rounding 25, 31 and 35, a Hessian 27, 37 and 34 (measured).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from math import prod
from typing import NamedTuple

from k2quant.calib.planning import product_rate, scores
from k2quant.calib.solving.memory import HELD
from k2quant.calib.stats.digests import base_of
from k2quant.calib.stats.layout import place_of
from k2quant.calib.stats.model import Model
from k2quant.checkpoint.weights import StoredWeight
from k2quant.conversion.estimate import search_rate
from k2quant.conversion.placing import Job
from k2quant.conversion.plan import Plan
from k2quant.formats.format import Format
from k2quant.ground import names

_WAYS = 3
"""In which a matrix is rounded, of which one ships: plainly, at searched scales, and solved."""
_SHARED = ".shared_experts.gate_proj"
_STAGES = {"q_a_proj": 1, "q_b_proj": 2, "kv_b_proj": 2, "o_proj": 3}
"""Inputs of attention by the stage in which they are seen: each sees the quantised weights of those before it."""


class Work(NamedTuple):
    """Operations of a whole run, or of a second."""

    model: float
    """Products of BF16, each multiplication with its addition one."""
    hessians: float
    """Products of pairs of columns, float32, each pair once."""
    factors: float
    """Of triangular factors: a sixth of the cube of the columns."""
    sweeps: float
    """Products that carry errors on to later columns: half of rows times the square of the columns."""
    search: float
    """Weights whose scales are searched."""
    judging: float
    """Products of what rounding changed with held-out tokens."""


def solved(plan: Plan, model: Model) -> Iterator[Job]:
    """Yield the weights of a plan that the pass solves: projections of decoder layers that get new codes.

    Args:
        plan: of the conversion.
        model: of its source.
    """
    for job in plan.jobs():
        place = place_of(base_of(job.weight) or "")
        if place is not None and place.layer < model.layers and plan.recipe.searches(job.weight):
            yield job


class Counts:
    """What is solved, counted in operations."""

    def __init__(self, model: Model, jobs: Iterable[Job], tokens: int, judging: int, length: int) -> None:
        """Group the matrices by their inputs.

        Args:
            model: its sizes.
            jobs: of what is solved.
            tokens: that Hessians are summed over.
            judging: that judge.
            length: tokens of a row.
        """
        self._model, self._tokens, self._judging, self._length = model, tokens, judging, length
        self.inputs: dict[tuple[str, int | None], list[int]] = {}
        """By name and expert: columns, and rows of all matrices that share it."""
        self._stages: dict[int, set[int]] = {}
        self._priors: set[str] = set()
        for job in jobs:
            place = place_of(base_of(job.weight) or "")
            if place is None:
                continue
            rows, columns = job.weight.shape
            found = self.inputs.setdefault((place.input, place.expert), [columns, 0])
            found[1] += rows
            if place.prior is not None:
                self._priors.add(place.prior)
            if (stage := _STAGES.get(place.input.rpartition(".")[2])) is not None:
                self._stages.setdefault(place.layer, set()).add(stage)

    def work(self, weights: Iterable[StoredWeight], *, searched: bool, propagate: bool) -> Work:
        """Return the operations of a run.

        Args:
            weights: of the checkpoint.
            searched: whether scales are.
            propagate: whether a layer sees what quantised layers give.
        """
        model, share = self._model, self._model.top_k / self._model.experts
        hessians = len(self._priors) * self._tokens * model.hidden**2 / 2
        factors = sweeps = search = judging = 0.0
        for (name, expert), (columns, rows) in self.inputs.items():
            seen = 1 if expert is None else share
            if name.replace(_SHARED, ".experts") not in self._priors:  # all tokens of the layer are summed once
                hessians += seen * self._tokens * columns**2 / 2
            factors += columns**3 / 6
            sweeps += rows * columns**2 / 2
            search += rows * columns * searched
            judging += _WAYS * min(HELD, seen * self._judging) * rows * columns
        attention, mlp = self._forward(weights)
        aside = self._judging if propagate else self._tokens + self._judging  # those that the source's weights see too
        forward = (self._tokens + self._judging) * (attention + mlp) + aside * mlp
        return Work(forward, hessians, factors, sweeps, search, judging)

    def _forward(self, weights: Iterable[StoredWeight]) -> tuple[float, float]:
        """Return the products that a token takes in all layers, in attention as often as it has stages, and in MLPs."""
        model, share = self._model, self._model.top_k / self._model.experts
        looks = scores(model, self._length) / model.layers
        attention, mlp = looks * sum(map(self._often, range(model.layers))), 0.0
        for weight in weights:
            base = base_of(weight) or ""
            layer = names.layer(base)
            if not names.is_projection(base) or layer is None or layer >= model.layers:
                continue
            if ".self_attn." in base:
                attention += prod(weight.shape) * self._often(layer)
            else:
                mlp += prod(weight.shape) * (1.0 if names.expert(base) is None else share)
        return attention, mlp

    def _often(self, layer: int) -> int:
        return 1 + len(self._stages.get(layer, ()))


_PROBE_TOKENS, _PROBE_COLUMNS, _PROBE_ROWS = 1024, 2048, 256
_PROBE_SECONDS = 0.2


def measured(model: Model, device: str, workers: int, target: Format | None) -> Work:
    """Return the operations of a second, on small matrices.

    Args:
        model: whose experts.
        device: where layers compute.
        workers: threads.
        target: the format of what is solved; None where nothing is.
    """
    import torch

    from k2quant.calib.collecting.moments import Hessian
    from k2quant.kernels.codecs.grids import GROUP
    from k2quant.kernels.devices.precision import whole_float32
    from k2quant.kernels.devices.single import single_threaded
    from k2quant.kernels.solvers.errors import output_error
    from k2quant.kernels.solvers.factors import factorise
    from k2quant.kernels.solvers.gptq import solve
    from k2quant.model.placement import checked_device

    place = torch.device(checked_device(device))
    columns, rows, tokens = _PROBE_COLUMNS, _PROBE_ROWS, _PROBE_TOKENS
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, columns, generator=generator).to(torch.bfloat16).to(place)
    weights = (torch.randn(rows, columns, generator=generator) * 0.02).to(torch.bfloat16).to(place)
    scales = (weights.float().unflatten(1, (-1, GROUP)).abs().amax(-1) / 7).to(torch.bfloat16)
    gram = x.float().T @ x.float() / tokens
    values, each = torch.zeros_like(weights), torch.ones(tokens, device=place)

    factor = factorise(gram)
    if factor is None:
        msg = "the Hessian of random inputs has no factor"
        raise AssertionError(msg)

    def seconds(work: Callable[[], object]) -> float:
        with whole_float32(), single_threaded():  # as in a run
            return abreast(work, workers)

    return Work(
        model=product_rate(model, device),
        hessians=tokens * columns**2 / 2 / seconds(lambda: Hessian(columns, place).add(x)),
        factors=columns**3 / 6 / seconds(lambda: factorise(gram)),
        sweeps=rows * columns**2 / 2 / seconds(lambda: solve(weights, scales, factor)),
        search=1.0 if target is None else workers * search_rate(target, weighted=True),
        judging=tokens * rows * columns / seconds(lambda: output_error(weights, values, x, each)),
    )


def abreast(work: Callable[[], object], workers: int) -> float:
    """Return the seconds that a piece of work takes, where as many are done at a time as there are workers.

    Each thread has torch's products to itself, as in a run. The first piece, which compiles or loads what it needs,
    does not count.
    """
    work()
    done, begun = [0] * workers, time.perf_counter()

    def repeat(number: int) -> None:
        while not done[number] or time.perf_counter() - begun < _PROBE_SECONDS:
            work()
            done[number] += 1

    threads = [threading.Thread(target=repeat, args=(number,), daemon=True) for number in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return (time.perf_counter() - begun) / sum(done)
