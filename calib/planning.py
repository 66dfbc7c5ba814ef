"""`--dry-run` of `calibrate`: what it will take, told by headers, the config, and a second of measuring."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

from k2quant.calib.collecting import Needs, needs
from k2quant.calib.coverage import THIN
from k2quant.calib.inputs.choosing import check_rows, held_out_rows
from k2quant.calib.stats.layout import inputs, stats_bytes
from k2quant.calib.stats.model import Model
from k2quant.checkpoint.files.paths import nearest_folder
from k2quant.checkpoint.reader import Checkpoint, open_checkpoint
from k2quant.checkpoint.remote.address import Address, spot
from k2quant.checkpoint.weights import StoredWeight, group_tensors
from k2quant.conversion.estimate import read_rate, seconds_of
from k2quant.conversion.resume import refuse_nested
from k2quant.ground import names
from k2quant.ground.saying.showing import as_html, brief
from k2quant.ground.units import parse_size

_PROBE_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationPlan:
    """What a calibration will take, of data that has as many tokens as are asked for."""

    tokens: int
    """That are measured."""
    judging: int
    """That judge."""
    experts: int
    """Routed experts of a layer."""
    mean: float
    """Tokens that an expert sees in the mean."""
    thin: float
    """Tokens of an expert with `THIN` of the mean: few routers are so even that none is so thin."""
    hidden: int
    """Columns of what an expert's gate and up multiply."""
    inner: int
    """Columns of what its down multiplies."""
    stats_bytes: int
    """Of the finished folder."""
    disk_needed: int
    """Bytes of that and of the hidden states, of two layers at a time, that lie there until it is finished."""
    disk_free: int
    """Bytes, where the folder will lie."""
    passes: Needs
    """What memory it takes, and how often experts are read in that memory."""
    bytes_read: int
    """Of the checkpoint, those that are read several times so often."""
    work: int
    """Multiplications and additions, each pair one."""
    rate: float
    """Of them a second, as just measured on a product of BF16 matrices as large as an expert's."""
    reading: float
    """Bytes of the checkpoint a second, as just measured on its beginning."""

    @property
    def seconds(self) -> float:
        """How long it will take, about."""
        return self.work / self.rate + self.bytes_read / self.reading

    @property
    def fits(self) -> bool:
        """Whether the disk has room."""
        return self.disk_needed <= self.disk_free

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    def _repr_html_(self) -> str:
        """Return it as a small table, for notebooks."""
        return as_html(self)


def plan_calibration(
    source: str | os.PathLike[str] | Address,
    stats: str | os.PathLike[str],
    *,
    samples: int = 512,
    length: int = 2048,
    hessians: bool = False,
    memory: int | str = "32GB",
    device: str = "cpu",
    follow_links: bool = False,
) -> CalibrationPlan:
    """Plan a calibration; headers, the config and the beginning of a shard are read, nothing is written.

    Args:
        source: folder of the checkpoint.
        stats: folder that would be written.
        samples: rows that are measured.
        length: tokens of a row.
        hessians: whether products of all pairs of columns are summed too.
        memory: bytes, or a size such as `32GB`, that the pass may take.
        device: where layers compute.
        follow_links: whether links of the checkpoint's folder may lead out of it.

    Raises:
        UsageError: an option makes no sense, or `memory` is too small.
        CheckpointError: the checkpoint is no model.
    """
    place, folder = spot(source), Path(stats)
    refuse_nested(place, folder)
    limit = parse_size(memory) if isinstance(memory, str) else memory
    checkpoint = open_checkpoint(place, follow_links=follow_links)
    model = Model.of(checkpoint.config, file=checkpoint.folder / "config.json")
    check_rows(samples, length, longest=longest(checkpoint))
    rows = samples, held_out_rows(samples)
    passes = needs(checkpoint, rows=rows, length=length, memory=limit, hessians=hessians)
    sizes = Sizes.of(model, group_tensors(checkpoint.tensors).weights, passes)
    tokens, judging = (count * length for count in rows)
    mean = tokens * model.top_k / model.experts
    written = stats_bytes(model, hessians=hessians)
    return CalibrationPlan(
        tokens=tokens,
        judging=judging,
        experts=model.experts,
        mean=mean,
        thin=mean * THIN,
        hidden=model.hidden,
        inner=model.inner,
        stats_bytes=written,
        disk_needed=written + 2 * passes.hidden,
        disk_free=shutil.disk_usage(nearest_folder(folder)).free,
        passes=passes,
        bytes_read=sizes.read,
        work=(tokens + judging) * (sizes.active + scores(model, length) + (pairs(model) if hessians else 0)),
        rate=product_rate(model, device),
        reading=read_rate(checkpoint),
    )


def longest(checkpoint: Checkpoint) -> int | None:
    """Return the tokens that a model reads, as its config has them; None where it does not say."""
    config = checkpoint.config or {}
    found = config.get("text_config", config).get("max_position_embeddings")
    return found if type(found) is int else None


class Sizes(NamedTuple):
    """How many bytes and how many weights a pass has to do with."""

    read: int
    """Bytes that it reads."""
    active: int
    """Weights that a token is multiplied by."""

    @classmethod
    def of(cls, model: Model, weights: Iterable[StoredWeight], passes: Needs) -> Sizes:
        """Count.

        Args:
            model: of the checkpoint.
            weights: of the checkpoint.
            passes: says how often experts are read.
        """
        often = 1 if passes.chunk >= model.experts else passes.waves
        read = routed = plain = 0
        for weight in weights:
            name = names.in_language_model(weight.main.name)
            if name is None or not _used(name, model):
                continue
            base, _ = names.split(name)
            expert = names.expert(base)
            read += weight.nbytes * (1 if expert is None else often)
            routed += prod(weight.shape) * (expert is not None)
            plain += prod(weight.shape) * names.is_projection(base) * (expert is None)
        return cls(read, plain + routed * model.top_k // model.experts)


def _used(name: str, model: Model) -> bool:
    layer = names.layer(name)
    return layer is None or layer < model.layers


def scores(model: Model, length: int) -> int:
    """Return the products that attention takes beside its matrices, for a token in the mean, in all layers.

    A token looks at half of a row in the mean; documents that are shorter than a row take less.
    """
    heads = int(model.config["num_attention_heads"])
    width = sum(int(model.config[f"{name}_head_dim"]) for name in ("qk_nope", "qk_rope", "v"))
    return model.layers * heads * width * length // 2


def pairs(model: Model) -> int:
    """Return the products of pairs of columns that a token's Hessians take in all layers, each pair once."""
    found = (one for layer in range(model.layers) for one in inputs(model, layer))
    return sum(one.width**2 // 2 * (1 if one.experts is None else model.top_k) for one in found)


def product_rate(model: Model, device: str) -> float:
    """Return the multiplications a second of BF16 matrices as large as an expert's, measured now.

    Args:
        model: whose experts.
        device: where.
    """
    import torch

    from k2quant.model.placement import checked_device

    where = checked_device(device)
    weight = torch.zeros(model.inner, model.hidden, dtype=torch.bfloat16, device=where)
    given = torch.zeros(_PROBE_TOKENS, model.hidden, dtype=torch.bfloat16, device=where)

    def product() -> None:
        (given @ weight.T)[0, 0].item()  # which a GPU is waited for

    return _PROBE_TOKENS * model.inner * model.hidden / seconds_of(product)
