"""The model that was calibrated: what of its config decides what is computed, and the sizes that follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from k2quant.checkpoint.files.json_kinds import whole
from k2quant.errors import MalformedFile

_LARGEST = 2**31
_LAYERS, _EXPERTS = 10_000, 2**16  # K2 has 61 and 384; more are an attempt to keep the reader busy

_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "num_attention_heads",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
)
"""Sizes that a config must name."""

_OTHERS = (
    "first_k_dense_replace",
    "q_lora_rank",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "routed_scaling_factor",
    "rms_norm_eps",
    "attention_bias",
    "hidden_act",
    "scoring_func",
    "topk_method",
    "rope_interleave",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
)
"""What else decides what a layer's inputs are; the rest of a config may change without making a calibration stale."""


@dataclass(frozen=True, slots=True)
class Model:
    """What a config says of the language model, as far as its layers' inputs depend on it."""

    config: Mapping[str, Any]
    """Those keys, as config.json names them; their sizes are checked."""

    @classmethod
    def of(cls, config: Mapping[str, Any] | None, *, file: object = "config.json") -> Model:
        """Take from a config, or from its `text_config`, what matters here.

        Args:
            config: what a config.json holds.
            file: where it stands, for the message.

        Raises:
            MalformedFile: it is not there, lacks a size, or one of them is none.
        """
        text = (config or {}).get("text_config", config)
        if not isinstance(text, Mapping):
            raise MalformedFile("has no sizes of a model", file=file, remedy="take it from the model's release")
        kept = {key: text[key] for key in (*_SIZES, *_OTHERS) if text.get(key) is not None}
        try:
            for key in _SIZES:
                whole(kept[key], 0 if key == "n_shared_experts" else 1, _LARGEST)
            whole(kept.get("first_k_dense_replace", 0), 0, _LARGEST)
            whole(kept.get("q_lora_rank", 1), 1, _LARGEST)
            whole(kept["num_hidden_layers"], 1, _LAYERS)
            whole(kept["num_experts_per_tok"], 1, whole(kept["n_routed_experts"], 1, _EXPERTS) + 1)
        except KeyError as error:
            raise MalformedFile("lacks a size of the model", file=file, expected=error.args[0]) from error
        except ValueError as error:
            raise MalformedFile("a size of the model", file=file, found=str(error)) from error
        return cls(kept)

    @property
    def layers(self) -> int:
        """Decoder layers, those that predict further tokens (MTP) not among them."""
        return int(self.config["num_hidden_layers"])

    @property
    def first_routed(self) -> int:
        """The first layer with routed experts; those before it have a dense MLP."""
        return min(int(self.config.get("first_k_dense_replace", 0)), self.layers)

    @property
    def experts(self) -> int:
        """Routed experts of a layer."""
        return int(self.config["n_routed_experts"])

    @property
    def top_k(self) -> int:
        """How many of them a token has."""
        return int(self.config["num_experts_per_tok"])

    @property
    def hidden(self) -> int:
        """Columns of a token: K of an expert's gate and up."""
        return int(self.config["hidden_size"])

    @property
    def inner(self) -> int:
        """Width of a routed expert: K of its down."""
        return int(self.config["moe_intermediate_size"])

    @property
    def shared(self) -> int:
        """Width of all shared experts together: K of their down; 0 where there are none."""
        return self.inner * int(self.config["n_shared_experts"])

    @property
    def dense(self) -> int:
        """Width of the MLP of a layer without routed experts: K of its down."""
        return int(self.config["intermediate_size"])

    @property
    def query(self) -> int | None:
        """K of q_b; None where queries are not compressed."""
        found = self.config.get("q_lora_rank")
        return None if found is None else int(found)

    @property
    def latent(self) -> int:
        """K of kv_b."""
        return int(self.config["kv_lora_rank"])

    @property
    def values(self) -> int:
        """K of o: the heads' values side by side."""
        return int(self.config["num_attention_heads"]) * int(self.config["v_head_dim"])
