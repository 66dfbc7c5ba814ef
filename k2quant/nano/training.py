"""Train nano-K2 from nothing: AdamW on the answers alone, and the bias that keeps the experts equally busy."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from threading import Lock
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DeepseekV3ForCausalLM

from k2quant.errors import UsageError
from k2quant.nano import architecture
from k2quant.nano.batches import NO_TARGET, Batch, batches, mixture


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to train; the defaults take three minutes on two cores."""

    steps: int = 1300
    """Batches; each is seen once."""
    seed: int = 0
    """Of weights and items."""
    rows: int = 16
    """Of a batch, `batches.ROW` tokens each."""
    rate: float = 1.2e-3
    """Highest learning rate, reached after the warm-up."""
    warmup: float = 0.05
    """Share of the steps in which the rate grows; after it, it falls to nothing in a straight line."""
    balance: float = 0.01
    """How far a step moves the bias of an expert that had too much or too little to do."""
    workers: int = 2
    """Threads that share the rows of a batch, each with one thread of torch. A fixed number, whatever the machine has:
    another would add in another order. They meet once a step, so a busy core costs no more than its share."""

    def __post_init__(self) -> None:
        """Refuse what cannot be trained.

        Raises:
            UsageError: it is out of range.
        """
        limits = {"steps": (1, 2**31), "seed": (0, 2**63), "rows": (2, 2**16), "workers": (1, 256)}
        for name, (least, beyond) in limits.items():
            value = getattr(self, name)
            if type(value) is not int or not least <= value < beyond:
                raise UsageError(f"{name}: expected a whole number from {least} to {beyond - 1}, found {value!r}")
        if self.rows < self.workers:
            raise UsageError(f"rows: expected at least one for each of {self.workers} workers, found {self.rows}")


class Balance:
    """The rule without an auxiliary loss: after a step, experts with too few tokens become likelier, others less so."""

    def __init__(self, model: nn.Module, rate: float) -> None:
        """Watch every router of a model, until `close`."""
        self.rate = rate
        self._gates = {name: gate for name, gate in model.named_modules() if hasattr(gate, "e_score_correction_bias")}
        self.loads = {name: torch.zeros_like(_bias(gate)) for name, gate in self._gates.items()}
        """Tokens of each expert since the last step, by the router's name."""
        self._lock = Lock()
        self._hooks = [gate.register_forward_hook(self._counter(name)) for name, gate in self._gates.items()]

    def _counter(self, name: str) -> Callable[[nn.Module, Any, tuple[Tensor, Tensor, Tensor]], None]:
        def count(gate: nn.Module, _: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            counts = output[2].flatten().bincount(minlength=len(_bias(gate)))
            with self._lock:  # the workers' passes meet here; sums of whole numbers know no order
                self.loads[name] += counts

        return count

    def step(self) -> None:
        """Move every bias by the sign of what its expert lacked, and begin to count anew."""
        for name, gate in self._gates.items():
            load = self.loads[name]
            _bias(gate).add_(self.rate * (load.mean() - load).sign())
            load.zero_()

    def close(self) -> None:
        """Leave the model alone again."""
        for hook in self._hooks:
            hook.remove()


def _bias(gate: nn.Module) -> Tensor:
    return cast("Tensor", gate.e_score_correction_bias)


def answer_loss(model: DeepseekV3ForCausalLM, batch: Batch) -> Tensor:
    """Return the sum of the losses of the answers' tokens, in nats, float32."""
    hidden = model.model(input_ids=batch.tokens, position_ids=batch.positions, use_cache=False).last_hidden_state
    asked = batch.targets != NO_TARGET
    return functional.cross_entropy(model.lm_head(hidden[asked]), batch.targets[asked], reduction="sum")


def rate_at(step: int, recipe: Recipe) -> float:
    """Return the share of the highest rate that a step takes."""
    warm = max(1, round(recipe.steps * recipe.warmup))
    return min((step + 1) / warm, (recipe.steps - step) / max(1, recipe.steps - warm))


def train(
    recipe: Recipe,
    config: dict[str, Any] | None = None,
    *,
    progress: Callable[[int, int, float], None] | None = None,
) -> DeepseekV3ForCausalLM:
    """Return a trained model, float32.

    The same recipe gives the same bits again on the same kind of CPU with the same torch, whatever else the machine
    does; another CPU or torch may add in another order.

    Args:
        recipe: how.
        config: keys of config.json; None for `architecture.CONFIG`.
        progress: is told the steps done, all steps and the last loss.
    """
    with _reproducible(recipe):
        model = architecture.build(config)
        model.train()
        for step, loss in enumerate(_losses(model, recipe), 1):
            if progress is not None:
                progress(step, recipe.steps, loss)
    model.eval()
    return model


def _losses(model: DeepseekV3ForCausalLM, recipe: Recipe) -> Iterator[float]:
    """Take every step and yield its loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, recipe))
    balance = Balance(model, recipe.balance)
    pool = ThreadPoolExecutor(recipe.workers, initializer=torch.set_num_threads, initargs=(1,))
    with pool, contextlib.closing(balance):
        for batch in islice(batches(mixture(recipe.seed), recipe.rows), recipe.steps):
            yield _set_gradients(model, batch, pool, recipe.workers)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            balance.step()


def _set_gradients(model: DeepseekV3ForCausalLM, batch: Batch, pool: Executor, workers: int) -> float:
    """Let each worker differentiate the loss of its rows, set the sums as gradients, and return the mean loss."""
    parameters = list(model.parameters())
    answers = int((batch.targets != NO_TARGET).sum())

    def differentiate(part: Batch) -> tuple[float, tuple[Tensor, ...]]:
        loss = answer_loss(model, part) / answers
        return loss.item(), torch.autograd.grad(loss, parameters)

    losses, gradients = zip(*pool.map(differentiate, batch.parts(workers)), strict=True)
    for parameter, *shares in zip(parameters, *gradients, strict=True):
        parameter.grad = torch.stack(shares).sum(0)
    return math.fsum(losses)


@contextlib.contextmanager
def _reproducible(recipe: Recipe) -> Iterator[None]:
    """Fix torch's seed, number of threads and algorithms, and put them back."""
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(strict)
