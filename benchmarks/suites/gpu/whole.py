"""What a user does, on the GPU: a conversion, a layer of full size that is loaded and decodes, steps of training."""

from __future__ import annotations

import filecmp
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k2quant.conversion.convert import convert
from k2quant.formats.known import FormatName
from k2quant.ground.release import EXPERTS
from k2quant.kernels.ops import warmup
from k2quant.model import load_model
from k2quant.model.modules import QuantizedExperts
from suites.common import measure
from suites.conversion.sources import CONFIG
from suites.gpu import training
from suites.gpu.running import record
from suites.gpu.running.record import Entry, Record
from suites.gpu.running.stages import Setting
from suites.models.sources import LAYER_VOCABULARY, TINY, write_layer
from suites.products.run import gpu_lost

TASKS: tuple[tuple[FormatName, FormatName], ...] = (
    ("fp8", "int4"),
    ("fp8", "bf16"),
    ("bf16", "fp8"),
    ("fp8", "nvfp4"),
)
"""Conversions: from, to; the BF16 source is what the second of them wrote."""
NEAR = 0.02
"""Relative difference that the experts' results may have from the reference's, which rounds weights to BF16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much of everything."""

    shape: dict[str, Any]
    """The layer's config."""
    converted: int = 44
    """Experts of the slice that is converted: 1.94 GB in FP8."""
    loaded: int = EXPERTS
    """Experts of the layer that is loaded."""
    new_tokens: int = 16
    batches: tuple[int, ...] = (1, 8)
    prompt: int = 32
    tasks: tuple[tuple[FormatName, FormatName], ...] = TASKS
    runs: tuple[str, ...] = ("cpu", "gpu, first", "gpu")
    """Of each conversion: the first on the GPU compiles."""

    @classmethod
    def tiny(cls) -> Sizes:
        """Return those of a dry run."""
        little = {"converted": 2, "loaded": 16, "new_tokens": 1, "batches": (1,), "prompt": 4}
        return cls(shape=CONFIG | TINY, tasks=TASKS[:2], runs=("cpu", "gpu"), **little)  # type: ignore[arg-type]


def run(kept: Record, setting: Setting) -> None:
    """Try everything, each by itself."""
    sizes = Sizes.tiny() if setting.dry_run else Sizes(shape=CONFIG)
    folder = setting.work / "whole"
    try:
        for source, target in sizes.tasks:
            name = f"convert {source.upper()} -> {target.upper()}"
            kept.attempt(name, partial(conversion, folder, source, target, sizes, setting), fatal=gpu_lost)
        measure.remove(folder)
        kept.attempt("one layer, INT4", partial(layer, folder, sizes, setting), fatal=gpu_lost)
        measure.remove(folder)
        kept.attempt("one QAT step of nano-K2", partial(training.step, folder, setting))
        kept.attempt("FSDP2, one process", partial(training.fsdp2, setting))
    finally:
        measure.remove(folder)


def conversion(folder: Path, source: FormatName, target: FormatName, sizes: Sizes, setting: Setting) -> Entry:
    """Convert by the CPU, then twice by the GPU; the files must be equal."""
    given = folder / source if source == "fp8" else folder / "fp8-bf16-cpu"
    if source != "fp8" and not given.exists():
        raise FileNotFoundError("its source was not made: see the conversion before it")
    if not given.exists():
        write_layer(given, sizes.converted, sizes.shape, "fp8")
    seconds: dict[str, float] = {}
    outs: dict[str, Path] = {}
    for name in sizes.runs:
        outs[name] = folder / f"{source}-{target}-{name.replace(', ', '-')}"
        with _codecs_of(name, setting) as options:
            begun = time.perf_counter()
            convert(given, outs[name], to=target, **options)
            seconds[name] = time.perf_counter() - begun
    differing = [f"{name}: {path}" for name in sizes.runs[1:] for path in _differing(outs["cpu"], outs[name])]
    for name in sizes.runs[1:]:
        measure.remove(outs[name])
    size = measure.size(given)
    said = "; ".join(differing) if differing else f"equal bytes; {size / 1e9:.2f} GB read"
    said += "".join(f", {name} {taken:.2f} s" for name, taken in seconds.items())
    outcome = record.MISSED if differing else record.PASSED
    return {"outcome": outcome, "said": said, "seconds": seconds, "source_bytes": size, "differing": differing}


@contextmanager
def _codecs_of(name: str, setting: Setting) -> Iterator[dict[str, Any]]:
    """Have a conversion use the CPU or the GPU; in a dry run the GPU's kernels are interpreted, on one thread."""
    if name == "cpu" or not setting.dry_run:
        yield {"device": "cpu" if name == "cpu" else "cuda"}
        return
    from k2quant.kernels.codecs import choice
    from suites.gpu.running import rehearsal

    usual = choice.codecs
    choice.codecs = rehearsal.codecs
    try:
        yield {"workers": 1}
    finally:
        choice.codecs = usual


def _differing(one: Path, other: Path) -> list[str]:
    """Return the names of weight files that differ or are missing."""
    names = {path.name for folder in (one, other) for path in folder.glob("*.safetensors")}
    _, different, missing = filecmp.cmpfiles(one, other, sorted(names), shallow=False)
    return [*different, *missing]


def layer(folder: Path, sizes: Sizes, setting: Setting) -> Entry:
    """Load one layer with all experts, compile, decode, and hold the experts to plain torch on the same GPU."""
    write_layer(folder, sizes.loaded, sizes.shape, "int4")
    place = "cpu" if setting.dry_run else "cuda:0"
    begun = time.perf_counter()
    model: Any = load_model(folder, device=place)
    _wait()
    facts: dict[str, Any] = {"bytes": measure.size(folder), "load_s": time.perf_counter() - begun}
    facts["memory"] = torch.cuda.memory_allocated() if setting.device == "cuda" else None
    with torch.inference_mode():
        facts |= _run(model, sizes, setting)
        found = through_experts(model, sizes.prompt, setting)
    del model
    plain: Any = load_model(folder, device=place, backend="reference")
    with torch.inference_mode():
        wanted = through_experts(plain, sizes.prompt, setting)
    facts["difference"] = float((found - wanted).norm() / wanted.norm())
    return judge(facts) | facts


def _run(model: Any, sizes: Sizes, setting: Setting) -> dict[str, Any]:
    """Warm a model up, then decode: how long both take, and what is compiled in each."""
    most = sizes.prompt * max(sizes.batches)  # no more rows come at once
    stacks = [tuple(map(module.packed, ("gate_proj", "up_proj", "down_proj"))) for module in _experts(model)]
    with _counted() as warming:
        begun = time.perf_counter()
        warmup([], stacks, rows=most)  # type: ignore[arg-type]  # three each
        _wait()
        seconds = time.perf_counter() - begun
    with _counted() as late:
        rates = {batch: decode(model, batch, sizes, setting) for batch in sizes.batches}
    facts: dict[str, Any] = {"warmup_s": seconds, "compiled_by_warmup": len(warming)}
    return facts | {"compiled_after": sorted(set(late)), "tokens_per_s": rates}


def judge(facts: dict[str, Any]) -> Entry:
    """Return the outcome of a layer, and all about it in a sentence."""
    said = []
    if not facts["difference"] <= NEAR:
        said.append(f"the experts' results differ by {facts['difference']:.1e}, allowed {NEAR}")
    if facts["compiled_after"]:
        said.append(f"compiled after warmup: {', '.join(facts['compiled_after'])}")
    outcome = record.MISSED if said else record.PASSED
    rates = ", ".join(f"{rate:.1f} tokens/s at batch {batch}" for batch, rate in facts["tokens_per_s"].items())
    said.append(
        f"{facts['bytes'] / 1e9:.2f} GB loaded in {facts['load_s']:.1f} s, warmed up in {facts['warmup_s']:.1f} s "
        f"({facts['compiled_by_warmup']} kernels, some of them from the disk), {rates}, "
        f"experts within {facts['difference']:.1e} of the reference"
    )
    return {"outcome": outcome, "said": "; ".join(said)}


def through_experts(model: Any, tokens: int, setting: Setting) -> Tensor:
    """Return what the experts of a layer give for a prompt, float64 `[T, H]`."""
    prompt = torch.randint(LAYER_VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(3))
    kept: list[Tensor] = []
    (experts,) = _experts(model)
    hook = experts.register_forward_hook(lambda _, __, out: kept.append(out.double()))
    try:
        model(input_ids=prompt.to(setting.device))
    finally:
        hook.remove()
    (out,) = kept
    return out


def decode(model: Any, rows: int, sizes: Sizes, setting: Setting) -> float:
    """Return the tokens a second that greedy decoding adds to a batch after its second token."""
    prompt = torch.randint(LAYER_VOCABULARY, (rows, sizes.prompt), generator=torch.Generator().manual_seed(rows))
    out = model(input_ids=prompt.to(setting.device), use_cache=True)
    begun = 0.0
    for number in range(sizes.new_tokens + 1):
        if number == 1:
            _wait()
            begun = time.perf_counter()
        last: Tensor = out.logits[:, -1].argmax(-1, keepdim=True)
        out = model(input_ids=last, past_key_values=out.past_key_values, use_cache=True)
    _wait()
    return rows * sizes.new_tokens / (time.perf_counter() - begun)


@contextmanager
def _counted() -> Iterator[list[str]]:
    """Collect the names of kernels that Triton compiles, or takes from its cache on the disk, meanwhile."""
    import triton

    names: list[str] = []

    def note(**facts: Any) -> None:
        names.append(facts["fn"].name)

    usual = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = note
    try:
        yield names
    finally:
        triton.knobs.runtime.jit_post_compile_hook = usual


def _experts(model: Any) -> list[QuantizedExperts]:
    return [module for module in model.modules() if isinstance(module, QuantizedExperts)]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
