"""One process or many: accelerate starts them, torch shards over them."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn

from k2quant.errors import CheckFailed, UsageError
from k2quant.qat.rounding.shards import is_sharded
from k2quant.qat.rounding.targets import Target

_PATIENCE = dt.timedelta(days=1)
"""How long processes wait for the first, which asks a teacher of all rows. A dead one is the launcher's to notice."""
_KINDS = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)


class Processes:
    """The processes that train one model."""

    def __init__(self, *, shard: bool, unused: bool = False) -> None:
        """Join the others, if accelerate or torchrun started some.

        Args:
            shard: whether parameters are to be sharded with torch's `fully_shard`.
            unused: whether some that are trained have no part in some steps, so that data parallelism has to look.

        Raises:
            UsageError: accelerate's FSDP plugin on CPUs, which runs plain data parallelism and says nothing, or its
                first version, or `shard` beside it or with one process; or another way to share the work.
        """
        # The job alone says in which precision products are computed, whatever `accelerate config` does.
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision="no",
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=_PATIENCE),
                DistributedDataParallelKwargs(find_unused_parameters=unused),
            ],
        )
        self._shard = shard
        plugin = self.accelerator.distributed_type == DistributedType.FSDP or _asked_for_fsdp()
        if plugin and self.device.type == "cpu":
            raise UsageError(
                "accelerate's FSDP plugin has no effect on CPUs: it runs plain data parallelism there; leave it out, "
                "and use `shard: true` to shard with torch's fully_shard"
            )
        if self.accelerator.distributed_type not in _KINDS:
            raise UsageError(
                f"accelerate was started for {self.accelerator.distributed_type.value}; use data parallelism, FSDP2 or "
                "`shard: true`"
            )
        if plugin and not self.accelerator.is_fsdp2:
            raise UsageError(
                "accelerate's FSDP plugin: only its second version keeps weights whole enough to round; "
                "set fsdp_version: 2"
            )
        if plugin and shard:
            raise UsageError("shard: accelerate's FSDP plugin shards already; use one of the two")
        if shard and self.world == 1:
            raise UsageError(
                "shard: there is one process, with nobody to share; start more with torchrun or accelerate launch"
            )
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

    def shard(self, task: nn.Module, model: nn.Module, targets: tuple[Target, ...]) -> None:
        """Shard a model over the processes, a layer at a time, if that is asked for.

        Args:
            task: what is called, with the model in it: its call gathers what no layer holds.
            model: a causal LM.
            targets: what is fake-quantised.

        Raises:
            CheckFailed: a parameter was not sharded, or along the dimension that groups lie in.
        """
        if not self.sharded:
            return
        if self._plugin:
            self._shard_with_plugin(task, model)
        else:
            from torch.distributed.fsdp import fully_shard

            causal: Any = model
            for layer in causal.model.layers:
                fully_shard(layer)
            fully_shard(task)
        sharded: Any = task
        # Also after a pass without gradients: what is saved, restored and clipped between passes are the shards.
        sharded.set_reshard_after_forward(True)
        check_sharded(model, targets, self.world)

    def _shard_with_plugin(self, task: Any, model: Any) -> None:
        """Shard as accelerate's FSDP2 plugin is set up.

        `Accelerator.prepare` wants the optimizer too, to put the shards in the place of its parameters; ours is made
        afterwards, of the shards.
        """
        from accelerate.utils import fsdp2_prepare_model

        plugin = self.accelerator.state.fsdp_plugin
        if plugin.activation_checkpointing:
            raise UsageError("accelerate's FSDP plugin: set `gradient_checkpointing` in the job, not in the plugin")
        plugin.cpu_ram_efficient_loading = False  # every process has the weights, and hooks that know where they lie
        task._no_split_modules = model._no_split_modules  # noqa: SLF001  where accelerate looks for a layer's class
        fsdp2_prepare_model(self.accelerator, task)

    def wrap(self, task: nn.Module) -> nn.Module:
        """Return what is called: the task itself, or data parallelism around it."""
        if self.world == 1 or self.sharded:
            return task
        wrapped: nn.Module = self.accelerator.prepare_model(task)
        return wrapped

    @contextlib.contextmanager
    def accumulating(self, wrapped: nn.Module, *, last: bool) -> Iterator[None]:
        """Keep gradients to oneself while the block runs, unless it is the step's last."""
        if self.sharded:
            sharded: Any = wrapped
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
