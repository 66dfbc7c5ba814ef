"""Post-training rounding as a job asks for it: what weights of its model become without training.

Scales that a search finds survive the plain rule: what is decoded at them, rounded plainly, has the same scales and
codes again (rule 7 of docs/formats.md). So a weight that was rounded well is set to those values, and forward pass,
export and gate need not know.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from k2quant.calib.stats.digests import digest_of
from k2quant.calib.stats.matching import check_bytes, check_source
from k2quant.calib.stats.reading import Stats, open_stats
from k2quant.checkpoint.panels import panel_rows
from k2quant.checkpoint.reader import Checkpoint
from k2quant.checkpoint.weights import group_tensors
from k2quant.formats.dtypes import as_bits
from k2quant.kernels.codecs import reference
from k2quant.kernels.codecs.choice import codecs
from k2quant.kernels.codecs.values import U16
from k2quant.qat.exporting.trained import key
from k2quant.qat.job import Fallback, Job
from k2quant.qat.preparing import Prepared
from k2quant.qat.rounding.adapters import low_rank
from k2quant.qat.rounding.rules import as_bf16
from k2quant.qat.rounding.scales import learned_scale
from k2quant.qat.rounding.shards import is_sharded, like, whole
from k2quant.qat.rounding.targets import Part, Target
from k2quant.qat.run.folder import STATS


class PostTraining:
    """How weights are rounded without training: by the plain rule, or with scales that are searched."""

    def __init__(self, method: Fallback = "rtn", stats: Stats | None = None) -> None:
        """Choose a method.

        Args:
            method: `mse` and `imatrix` are for INT4 on the grid moonshot alone, which a job has seen to.
            stats: of the model's inputs; with `imatrix`.
        """
        self.searches = method != "rtn"
        self.stats = stats
        self._codec = codecs("cpu").int4

    @classmethod
    def of(cls, job: Job) -> PostTraining:
        """Return that of a job.

        Raises:
            CheckpointError: its statistics are none, unfinished or damaged.
        """
        stats = job.training.fallback_stats
        return cls(job.training.fallback, None if stats is None else open_stats(Path(stats)))

    def facts(self) -> dict[str, str]:
        """Return what a run's manifest says of the statistics, if there are any."""
        return {} if self.stats is None else {STATS: self.stats.fingerprint}

    def check(self, source: Checkpoint, bases: Collection[str] = ()) -> None:
        """Refuse statistics of another model, or of one in which a weight has changed.

        Args:
            source: the model's checkpoint.
            bases: of the weights whose bytes are read and compared, by name in the language model.

        Raises:
            CheckpointError: so they are.
        """
        if self.stats is None:
            return
        weights = group_tensors(source.tensors).weights
        check_source(self.stats, source, weights)
        for weight in weights:
            if key(weight) in bases:
                check_bytes(self.stats, weight, digest_of(source, weight))

    def rounded(self, base: str, weights: Tensor, bits: int) -> Tensor:
        """Return what stands for BF16 weights `[R, K]` afterwards: values that the plain rule rounds as was decided.

        Where held-out data finds plain scales better, these are the weights themselves. Where nothing was measured, a
        search lets all columns count alike.

        Args:
            base: their name in the language model.
            weights: on a CPU.
            bits: width of the codes.
        """
        if not self.searches:
            return weights
        plain = reference.plain_int4_scale(weights, "moonshot", bits)
        source, found = as_bits(weights), np.empty_like(as_bits(plain))
        importance, mean = (None, None) if self.stats is None else (self.stats.importance(base), self.stats.mean(base))
        for start, stop in panel_rows(tuple(weights.shape)):
            # Scales that `recover` would keep need not survive the plain rule.
            rows = slice(start, stop)
            self._codec.search(source[rows], importance, found[rows], mean=mean, bits=bits, recover=False)
        if self._worse(base, source, (found, as_bits(plain)), bits):
            return weights
        scale = torch.from_numpy(found.view(np.int16)).view(torch.bfloat16)
        return reference.int4_at_scale(weights, scale, bits)[1]

    def _worse(self, base: str, weights: U16, scales: tuple[U16, U16], bits: int) -> bool:
        """Tell whether held-out data finds the first scales worse than the second."""
        held = None if self.stats is None else self.stats.held_out(base)
        if held is None:
            return False
        panels = list(panel_rows(weights.shape))
        ours, plain = (
            sum(
                self._codec.weighted_error(
                    weights[start:stop], each[start:stop], held.values, mean=held.mean, bits=bits
                )
                for start, stop in panels
            )
            for each in scales
        )
        return ours > plain


def take_over(target: Target, parts: Iterable[tuple[Part, Tensor]], bits: int) -> None:
    """Give matrices of a parameter, which may lie in shards, other values; updates and learned scales begin anew."""
    update, scale = low_rank(target), learned_scale(target)
    kept: list[Tensor] = [target.master]
    kept += [] if update is None else [update.b]
    kept += [] if scale is None else [scale.start, scale.ratio]
    full = [whole(tensor) for tensor in kept]
    for part, values in parts:
        part.of(full[0]).copy_(values)
        if update is not None:
            part.of(full[1]).zero_()
        if scale is not None:
            part.of(full[-2]).copy_(reference.plain_int4_scale(values, "moonshot", bits))
            part.of(full[-1]).fill_(1.0)
    for tensor, filled in zip(kept, full, strict=True):
        if is_sharded(tensor):
            tensor.copy_(like(filled, tensor, file="", name=""))


@torch.no_grad()
def round_start(found: Prepared, post_training: PostTraining) -> None:
    """Round all that a model fake-quantises as a job's post-training rounding does; it is not sharded."""
    for target in found.targets:
        take_over(target, _rounded(target, post_training, found.bits), found.bits)
    found.refresh()


def _rounded(target: Target, post_training: PostTraining, bits: int) -> Iterator[tuple[Part, Tensor]]:
    for part in target.parts:
        weights = as_bf16(part.of(target.master.detach())).contiguous().cpu()
        yield part, post_training.rounded(part.base, weights, bits)
