"""What engines fuse when they load a checkpoint: weights that one module of theirs holds.

vLLM and SGLang ask for the format of a fused module once and look at its first member only. Where the members differ,
some are read as what they are not: noise, or an error about a tensor that nobody expects.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from k2quant.ground import names


class Fused(NamedTuple):
    """A module of engines that holds several weights of a checkpoint."""

    name: str
    """As engines call it, such as `layers.3.mlp.experts`."""
    why: str
    """What engines do, in words."""


class Split(NamedTuple):
    """A fused module whose members are not stored alike."""

    fused: Fused
    first: tuple[str, str]
    """Base and format of its first member."""
    other: tuple[str, str]
    """Base and format of the first member that is stored otherwise."""

    def __str__(self) -> str:
        """Say which members differ, and why that matters."""
        (first, kept), (other, found) = self.first, self.other
        return f"{self.fused.why}, but `{first}` is {kept} and `{other}` is {found}"


_EXPERTS = "engines run all experts of a layer in one kernel, in one format"
_GATE_UP = "engines load gate_proj and up_proj as one matrix, with one format"
_FUSED = (
    (
        re.compile(r"(?P<place>mlp\.)experts\.[0-9]{1,6}\.(?:gate|up|down)_proj"),
        "experts",
        _EXPERTS,
    ),
    (re.compile(r"(?P<place>block_sparse_moe\.)experts\.[0-9]{1,6}\.w[123]"), "experts", _EXPERTS),
    (
        re.compile(r"(?P<place>mlp\.(?:shared_experts\.)?|block_sparse_moe\.shared_experts\.)(?:gate|up)_proj"),
        "gate_up_proj",
        _GATE_UP,
    ),
    (
        re.compile(r"(?P<place>self_attn\.)(?:q_a_proj|kv_a_proj_with_mqa)"),
        "fused_qkv_a_proj",
        "engines load q_a_proj and kv_a_proj_with_mqa as one matrix, with one format",
    ),
    (
        # K3's linear attention. In its layers of MLA, and in K2's, g_proj and q_proj stand alone: no split is found.
        re.compile(r"(?P<place>self_attn\.)(?:q|k|v|g|b|f_a)_proj"),
        "in_proj_qkvgfab",
        "engines load q_proj, k_proj, v_proj, g_proj, f_a_proj and b_proj of KDA as one matrix, with one format",
    ),
)
# Per expert, where `_FUSED` takes the experts of a layer together: each has a tensor scale of its own.
_SCALED = (
    (re.compile(r"(self_attn\.)(?:q_a_proj|kv_a_proj_with_mqa)"), "fused_qkv_a_proj"),
    (re.compile(r"(mlp\.(?:(?:shared_experts|experts\.[0-9]{1,6})\.)?)(?:gate|up)_proj"), "gate_up_proj"),
    (re.compile(r"(block_sparse_moe\.shared_experts\.)(?:gate|up)_proj"), "gate_up_proj"),
    (re.compile(r"(block_sparse_moe\.experts\.[0-9]{1,6}\.)w[13]"), "w13"),
)


def fused(base: str) -> Fused | None:
    """Return the module that engines put a weight in together with others, or None for one that stands alone."""
    place = names.place(base)
    if place is None:
        return None
    layer, rest = place
    for pattern, name, why in _FUSED:
        if match := pattern.fullmatch(rest):
            return Fused(f"layers.{layer}.{match['place']}{name}", why)
    return None


def scaled_together(base: str) -> str | None:
    """Return the key of the matrices that must share one scale of a whole matrix, or None for one that stands alone.

    They are those that engines lay into one matrix: gate and up of one expert, of the shared experts or of a dense MLP,
    and q_a with kv_a. Where two differ, vLLM warns and takes one for both, the gate's of an expert and the larger of a
    linear layer, so that the other's weights come out wrong (ModelOptNvFp4FusedMoE and ModelOptNvFp4LinearMethod of its
    model_executor/layers/quantization/modelopt.py).

    Args:
        base: a weight's name without its suffix, however its layer is spelled.
    """
    place = names.place(base)
    if place is None:
        return None
    layer, rest = place
    for pattern, name in _SCALED:
        if match := pattern.fullmatch(rest):
            return f"layers.{layer}.{match[1]}{name}"
    return None


def splits(stored: Iterable[tuple[str, str]]) -> list[Split]:
    """Return the fused modules whose members are not all stored alike.

    Args:
        stored: base and format of each weight, in the checkpoint's order.
    """
    first: dict[str, tuple[str, str]] = {}
    found: dict[str, Split] = {}
    for base, form in stored:
        whole = fused(base)
        if whole is None:
            continue
        begun = first.setdefault(whole.name, (base, form))
        if begun[1] != form and whole.name not in found:
            found[whole.name] = Split(whole, begun, (base, form))
    return list(found.values())


LABELS = {
    "vllm": "vLLM",
    "sglang": "SGLang",
    "tensorrt-llm": "TensorRT-LLM",
    "ktransformers": "KTransformers",
    "llama.cpp": "llama.cpp",
    "transformers": "transformers",
}
"""Engines whose requirements are known, by what the command line calls them, as they call themselves."""
