"""What GGUF calls the tensors of a K2.

The names are those of llama.cpp's architecture `deepseek2` (gguf-py, constants.py and tensor_mapping.py; conversion/
deepseek.py; src/models/deepseek2.cpp). K2.5's `language_model.` falls away.
"""

from __future__ import annotations

from k2quant.exports.places import Names
from k2quant.exports.stacks import Engine

_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

_ATTENTION = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
}
_DENSE = {f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")}
_SPARSE = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate.e_score_correction_bias": "exp_probs_b",
    **{f"mlp.experts.{part}_proj": f"ffn_{part}_exps" for part in ("gate", "up", "down")},
    **{f"mlp.shared_experts.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")},
}
_INSIDE = _ATTENTION | _DENSE | _SPARSE

CALLED = Names("blk", _OUTSIDE, _INSIDE, bias="bias")

ENGINE = Engine(
    "llama.cpp",
    CALLED,
    as_which="llama.cpp's deepseek2, as which K2 is read,",
    vision="llama.cpp reads these from a file of its own, mmproj, which its converter writes, and text works without",
)

HALVES = ("attn_k_b", "attn_v_b")
"""What becomes of `kv_b_proj`."""

SCALED = frozenset({"attn_output"})
"""Tensors that llama.cpp's graph of deepseek2 multiplies by the scale of the whole beside them, which NVFP4 has.

It loads such scales of experts and of other matrices, too, and then computes without (src/models/deepseek2.cpp gives
`build_moe_ffn` and `build_ffn` none, as llama-cpp-python 0.3.36 has it): a model of nano's size answered NaN.
"""
