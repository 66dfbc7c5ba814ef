"""k2quant and torchao side by side, on a nano-K2 whose experts are ordinary linears: torchao handles no others.

Both round every projection in groups of 32, each by the rule that it exports: k2quant amax/L on -L..L, torchao's
symmetric one. Both get the same plain loop, rows, steps and rates. torchao's loss after export is that of its own
`convert`, k2quant's that of the checkpoint on the disk.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from k2quant.data.packing import Rows, batch, order
from k2quant.data.sources import DataSource, load_rows
from k2quant.ground import names
from k2quant.model.generation import load_tokenizer
from k2quant.model.modules import FusedExperts, SeparateExperts
from k2quant.nano import tasks
from k2quant.nano.scoring import Score, score
from k2quant.qat import QATConfig, export, load, prepare
from k2quant.qat.rounding.targets import canonical
from k2quant.qat.training.task import learnt_logits
from suites.qat import arms as qat_arms

TOOLS = ("none", "k2quant", "torchao")
_HELD_OUT = 64  # rows, as the jobs hold out


def rows_of(base: Path, data: Path) -> Rows:
    """Return the rows to train on, those of `qat_arms`."""
    tokenizer: PreTrainedTokenizerBase = load_tokenizer(base)
    return load_rows(DataSource(path=str(data)), tokenizer, length=qat_arms.LENGTH, vocabulary=10**6)


def separate(model: Any) -> nn.Module:
    """Give a model's experts linears of their own, with the same weights."""
    for name, module in list(model.named_modules()):
        if isinstance(module, FusedExperts):
            model.set_submodule(name, _linears(module))
    whole: nn.Module = model
    return whole


@torch.no_grad()
def _linears(fused: FusedExperts) -> SeparateExperts:
    experts = SeparateExperts(fused.config)
    for name, matrix in fused.matrices():
        expert, projection = name.split(".")
        linear: Any = experts.get_submodule(f"{expert}.{projection}")
        linear.weight.copy_(matrix.parts()["weight"])
    return experts


def prepared_by(tool: str, model: nn.Module, bits: int) -> nn.Module:
    """Have a tool fake-quantise every projection of a model, or none."""
    if tool == "k2quant":
        return prepare(model, QATConfig(scope="projections", bits=bits))
    if tool == "torchao":
        from torchao.quantization import quantize_
        from torchao.quantization.qat import QATConfig as TorchaoConfig

        quantize_(model, TorchaoConfig(_torchao_rule(bits), step="prepare"), filter_fn=_is_projection)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.endswith("mlp.gate.weight"))
    return model


def _torchao_rule(bits: int) -> Any:
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    return IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(32))


def _is_projection(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and names.is_projection(canonical(name))


def optimizer_of(model: nn.Module, bits: int) -> torch.optim.Optimizer:
    """Return AdamW for what trains."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=qat_arms.RATES[bits], betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, rows: dict[str, Tensor]) -> float:
    """Take one step on some rows; return its seconds."""
    begun = time.perf_counter()
    logits, targets = learnt_logits(model, rows, torch.float32)
    functional.cross_entropy(logits, targets).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - begun


def batches(rows: Rows, seed: int) -> Iterator[dict[str, Tensor]]:
    """Yield the rows of step after step."""
    count = len(rows.tokens) - _HELD_OUT
    for number in range(qat_arms.STEPS):
        yield batch(rows, order(number, count, qat_arms.ROWS, seed))


def train(tool: str, base: Path, data: Path, *, bits: int, seed: int) -> tuple[Score, list[float]]:
    """Train with a tool and export; return the exam of what was exported, and the seconds of every step."""
    from k2quant.qat.job import Optimizer

    model = prepared_by(tool, separate(load(base)), bits)
    optimizer, schedule = optimizer_of(model, bits), Optimizer(rate=qat_arms.RATES[bits], warmup=qat_arms.WARMUP)
    seconds = []
    for number, rows in enumerate(batches(rows_of(base, data), seed)):
        for group in optimizer.param_groups:
            group["lr"] = qat_arms.RATES[bits] * schedule.share(number, qat_arms.STEPS)
        seconds.append(step(model, optimizer, rows))
    return _exported(tool, model, base, bits), seconds


def _exported(tool: str, model: nn.Module, base: Path, bits: int) -> Score:
    if tool == "torchao":
        from torchao.quantization import quantize_
        from torchao.quantization.qat import QATConfig as TorchaoConfig

        quantize_(model, TorchaoConfig(_torchao_rule(bits), step="convert"))
        return score(model, tasks.exam(100))
    folder = Path(tempfile.mkdtemp())
    try:
        export(model, folder / "export", base=base)
        return score(load(folder / "export"), tasks.exam(100))
    finally:
        shutil.rmtree(folder)
