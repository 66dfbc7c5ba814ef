"""How others than PEFT spell an adapter's tensors: names whose meaning is certain, and those that are only told apart.

Tinker writes one pair for a projection of all experts of a layer, `mlp.experts.w1.lora_A` of `[E, r, K]` and
`lora_B` of `[E, N, r]`, and calls the head `unembed_tokens`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_STACKED = re.compile(r"(?P<experts>.+\.mlp\.experts)\.(?P<projection>w[123]|(?:gate|up|down)_proj)")
_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
"""As DeepSeek's and Mistral's own code names them; in all of it w2 is the one that leads back."""

_HEAD = re.compile(r"(?P<prefix>(?:language_model\.)?)(?:model\.)?(?:language_model\.)?unembed_tokens")

_UNREAD = (
    (r"\.lora_(down|up)(\.|$)", "lora_down and lora_up, as kohya's scripts write them"),
    (r"\.lora_[ab](\.|$)", "lora_a and lora_b, as torchtune writes them"),
    (r"\.lora_embedding_[AB](\.|$)", "factors of an embedding"),
    (r"\.lora_magnitude_vector(\.|$)", "DoRA's magnitudes"),
    (r"\.adapter\.linear_(in|out)(\.|$)", "linear_in and linear_out, as Megatron and NeMo write them"),
)
"""Parts of names, and whose layout they are."""


class Stack(NamedTuple):
    """A projection of all experts of a layer."""

    name: str
    """As the adapter has it."""
    experts: str
    """The module of the experts."""
    projection: str
    """As a checkpoint names it."""


def stacked_experts(module: str) -> Stack | None:
    """Read the name of a module that stands for a projection of all experts, such as `...mlp.experts.w1`."""
    match = _STACKED.fullmatch(module)
    if match is None:
        return None
    return Stack(module, match["experts"], _PROJECTIONS.get(match["projection"], match["projection"]))


def usual(module: str) -> str:
    """Return the name that checkpoints have for a module."""
    match = _HEAD.fullmatch(module)
    return f"{match['prefix']}lm_head" if match else module


def unread(name: str) -> str | None:
    """Say whose layout a tensor's name is of, for those that are not read."""
    return next((words for pattern, words in _UNREAD if re.search(pattern, name)), None)
