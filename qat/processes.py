"""One process or many: accelerate starts them, torch shards over them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from k2quant.errors import CheckFailed, UsageError
from k2quant.qat.shards import is_sharded
from k2quant.qat.targets import Target


class Processes:
    """The processes that train one model."""

    def __init__(self, *, shard: bool) -> None:
        """Join the others, if accelerate or torchrun started some.

        Args:
            shard: whether parameters are to be sharded with torch's `fully_shard`.

        Raises:
            UsageError: accelerate's FSDP plugin on CPUs, which runs plain data parallelism and says nothing, or `shard`
                beside it or with one process.
        """
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self._shard = shard
        plugin = self.accelerator.distributed_type == DistributedType.FSDP or _asked_for_fsdp()
        if plugin and self.device.type == "cpu":
            raise UsageError(
                "accelerate's FSDP plugin has no effect on CPUs: it runs plain data parallelism there; leave it out, "
                "and use `shard: true` to shard with torch's fully_shard"
            )
        if plugin and shard:
            raise UsageError("shard: accelerate's FSDP plugin shards already; use one of the two")
        if shard and self.world == 1:
            raise UsageError("shard: there is one process, with nobody to share; start more with accelerate launch")
        self._plugin = plugin

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        found: torch.device = self.accelerator.device
        return found

    @property
    def rank(self) -> int:
        """The place of this process, from 0."""
        return int(self.accelerator.process_index)

    @property
    def world(self) -> int:
        """How many processes there are."""
        return int(self.accelerator.num_processes)

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether parameters lie in shards."""
        return self._shard or self._plugin

    def shard(self, model: nn.Module, targets: tuple[Target, ...]) -> None:
        """Shard a model over the processes, a layer at a time, if that is asked for.

        Raises:
            CheckFailed: a parameter was not sharded, or along the dimension that groups lie in.
        """
        if not self._shard:
            return
        from torch.distributed.fsdp import fully_shard

        causal: Any = model
        for layer in causal.model.layers:
            fully_shard(layer)
        fully_shard(model)
        check_sharded(model, targets, self.world)

    def wrap(self, task: nn.Module) -> nn.Module:
        """Return what is called: the task itself, or data parallelism around it."""
        if self.world == 1 or self.sharded:
            return task
        wrapped: nn.Module = self.accelerator.prepare_model(task)
        return wrapped

    @contextlib.contextmanager
    def accumulating(self, wrapped: nn.Module, model: nn.Module, *, last: bool) -> Iterator[None]:
        """Keep gradients to oneself while the block runs, unless it is the step's last."""
        if self._shard:
            sharded: Any = model
            sharded.set_requires_gradient_sync(last)
            yield
            return
        with contextlib.nullcontext() if last else self.accelerator.no_sync(wrapped):
            yield

    def total(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes."""
        if self.world == 1:
            return value
        summed: Tensor = self.accelerator.reduce(value, "sum")
        return summed

    def wait(self) -> None:
        """Wait for the others."""
        self.accelerator.wait_for_everyone()

    def end(self) -> None:
        """Leave the others."""
        self.accelerator.end_training()


def check_sharded(model: nn.Module, targets: tuple[Target, ...], world: int) -> None:
    """Refuse a model that is not sharded as it was asked for.

    Raises:
        CheckFailed: so it is.
    """
    for name, parameter in model.named_parameters():
        if not is_sharded(parameter):
            raise CheckFailed("is not sharded", tensor=name, expected=f"a part on each of {world} processes")
    for target in targets:
        for placement in getattr(target.master, "placements", ()):
            if getattr(placement, "dim", 0) == target.master.ndim - 1:
                raise CheckFailed("is sharded along its groups", tensor=target.name, expected="experts or rows")


def _asked_for_fsdp() -> bool:

    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in {"1", "true", "yes"}
