"""What a training watches beside its loss, and says at the end: routers, starved experts, codes that oscillate."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from k2quant.data.packing import NO_TARGET
from k2quant.ground import names
from k2quant.qat.job import Job
from k2quant.qat.preparing import Prepared
from k2quant.qat.report import PAGE, write_report
from k2quant.qat.rounding.survey import coverage
from k2quant.qat.rounding.targets import Target, canonical
from k2quant.qat.run.folder import Run
from k2quant.qat.run.history import read_history
from k2quant.qat.run.summary import SUMMARY, Coverage, Oscillations, RouterSummary, Summary, write_summary
from k2quant.qat.training.oscillation import Oscillation
from k2quant.qat.training.routers import RouterWatch, agreement

_SAMPLE = 2**16  # weights whose codes are watched, over all targets
_ROUTERS, _CHOICES, _CODES = "load:", "choices:", "codes:"

Total = Callable[[Tensor], Tensor]
"""Adds a tensor up over all processes."""
Passes = Callable[[Callable[[Mapping[str, Tensor]], object]], object]
"""Makes some forward passes; what it is given is called with the rows of each, before it."""


class Monitors:
    """The monitors of one training."""

    def __init__(self, model: nn.Module, found: Prepared, *, sharded: bool) -> None:
        """Begin to watch.

        Args:
            model: prepared, not sharded yet.
            found: what fake-quantises it.
            sharded: whether its parameters will lie in shards, whose codes are not watched.
        """
        self._model, self._prepared = model, found
        self._routers = RouterWatch(model)
        self._coverage = coverage(model, found.targets)
        self._start: dict[str, Tensor] = {}
        watched = found.targets if found.config.bit_widths and not sharded else ()
        each = max(_SAMPLE // max(len(watched), 1), 1)
        self._codes = Oscillation({target.name: _sampler(found, target, each) for target in watched})

    def begin(self, run: Passes) -> None:
        """Note what the start point does, and its codes."""
        with self._prepared.unquantised():
            self._start = self._choices(run)
        if self._prepared.enabled:
            self._codes.observe()

    @contextlib.contextmanager
    def counting(self, rows: Mapping[str, Tensor]) -> Iterator[None]:
        """Count where the routers send the tokens of a batch while the block runs."""
        self._routers.mask, self._routers.counting = _real(rows).flatten(), True
        try:
            yield
        finally:
            self._routers.mask, self._routers.counting = None, False

    def observe(self) -> None:
        """Look at the codes after a step."""
        if self._prepared.enabled:
            self._codes.observe()

    def rebase(self) -> None:
        """Compare the codes to come with none before: they have another width."""
        self._codes.rebase()

    def state(self, total: Total) -> dict[str, Tensor]:
        """Return everything that was seen, over all processes, as plain tensors."""
        return {
            **{f"{_ROUTERS}{name}": load for name, load in self._loads(total).items()},
            **{f"{_CHOICES}{name}": chosen for name, chosen in self._start.items()},
            **{f"{_CODES}{name}": value for name, value in self._codes.state().items()},
        }

    def restore(self, state: Mapping[str, Tensor], *, lead: bool) -> None:
        """Take over what `state` gave; of several processes, one goes on counting from the sum."""
        routers = _under(_ROUTERS, state)
        self._routers.restore(routers if lead else {name: torch.zeros_like(load) for name, load in routers.items()})
        self._start = _under(_CHOICES, state)
        self._codes.restore(_under(_CODES, state))

    def starved(self, least: int, total: Total) -> list[tuple[str, int]]:
        """Return the fake-quantised experts that saw fewer tokens than `least`, with how many."""
        found = []
        for name, load in self._loads(total).items():
            prefix = canonical(name).removesuffix("gate") + "experts"
            found += [(f"{prefix}.{expert}", int(count)) for expert, count in enumerate(load) if count < least]
        quantised = {part.base.rpartition(".")[0] for target in self._prepared.targets for part in target.parts}
        return [(name, count) for name, count in found if name in quantised]

    def summary(self, job: Job, starved: list[tuple[str, int]], run: Passes, total: Total) -> Summary:
        """Return what the finished run says; every process has to ask."""
        same = agreement(self._start, self._choices(run)) if self._start else {}
        routers = tuple(
            RouterSummary(
                name=name,
                layer=names.layer(canonical(name) + ".weight"),
                experts=len(load),
                load=tuple(load.tolist()),
                start_load=self._start_load(name, len(load)),
                agreement=same.get(name),
            )
            for name, load in self._loads(total).items()
        )
        return Summary(
            job=_facts(job),
            control=not job.training.fake_quantize,
            coverage=tuple(
                Coverage(kind=kind, quantised=quantised, parameters=count)
                for kind, (quantised, count) in self._coverage.items()
            ),
            routers=routers,
            least_tokens=job.training.least_tokens,
            starved=tuple(starved),
            oscillation=self._oscillation(),
        )

    def report(self, run: Run, summary: Summary) -> None:
        """Write summary and page."""
        write_summary(run.folder, summary)
        write_report(run.folder, read_history(run.history), summary)

    def _choices(self, run: Passes) -> dict[str, Tensor]:
        """Return what the routers choose for the real tokens of some passes."""

        def before(rows: Mapping[str, Tensor]) -> None:
            self._routers.mask = _real(rows).flatten()

        try:
            return self._routers.choices(lambda: run(before))
        finally:
            self._routers.mask = None

    def _start_load(self, name: str, experts: int) -> tuple[int, ...] | None:
        if name not in self._start:
            return None
        return tuple(self._start[name].flatten().bincount(minlength=experts).tolist())

    def _loads(self, total: Total) -> dict[str, Tensor]:
        # The sum is taken on each router's own device, where the processes can talk.
        loads = self._routers.load()
        device = next(self._model.parameters()).device
        return {name: total(load.to(device)).cpu() for name, load in loads.items()}

    def _oscillation(self) -> tuple[Oscillations, ...]:
        by_kind: dict[str, list[int]] = {}
        for name, counts in self._codes.counts().items():
            row = by_kind.setdefault(names.tensor_class(canonical(name)), [0, 0, 0])
            for place, count in enumerate(counts):
                row[place] += count
        return tuple(
            Oscillations(kind=kind, weights=row[0], flipped=row[1], oscillating=row[2]) for kind, row in by_kind.items()
        )


def reported(run: Run) -> bool:
    """Tell whether summary and page of a run are there."""
    return all((run.folder / name).is_file() for name in (SUMMARY, PAGE))


def _sampler(found: Prepared, target: Target, weights: int) -> Callable[[], Tensor]:
    """Return what gives the codes of some rows of a target, spread over all of its matrices."""
    rows = target.master.shape[:-1].numel()
    wanted = max(weights // target.master.shape[-1], 1)
    span = slice(0, None, max(rows // wanted, 1))
    return lambda: found.codes(target, span)


def _real(rows: Mapping[str, Tensor]) -> Tensor:
    """Tell which tokens are no padding, bool `[B, L]`: padding is a document of its own at the end, without targets."""
    places = torch.arange(rows["position_ids"].shape[1], device=rows["position_ids"].device)
    last = ((rows["position_ids"] == 0) * places).amax(1, keepdim=True)  # where the last document begins
    ending = places >= last
    learnt = ((rows["targets"] != NO_TARGET) & ending).any(1, keepdim=True)
    same = (rows["input_ids"] == rows["input_ids"][:, -1:]) | ~ending
    return ~ending | learnt | ~same.all(1, keepdim=True)


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _facts(job: Job) -> dict[str, str]:
    """Return a job in words."""
    facts: dict[str, Any] = {
        "model": job.model,
        "data": job.data.path,
        "format": job.quantize.format.in_words(job.final_bits),
        "scope": job.quantize.resolved_scope,
        "estimator": job.quantize.estimator,
        "trained": job.quantize.train,
        "optimizer": f"{job.optimizer.method}, rate {job.optimizer.rate:g}, {job.optimizer.decay}",
        "rows a step": f"{job.training.batch} of {job.data.length} tokens",
    }
    if job.distill is not None:
        facts["teacher"] = f"{job.distill.teacher or 'the start point'}, weight {job.distill.weight:g}"
    return {name: str(value) for name, value in facts.items()}
