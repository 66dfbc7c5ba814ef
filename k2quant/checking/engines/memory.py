"""What a device needs to hold of a model, by arithmetic: weights, what MLA makes of them, and its cache."""

from __future__ import annotations

from collections.abc import Collection
from math import prod
from typing import NamedTuple

from k2quant.checking.engines.subject import Kind, Subject, number
from k2quant.ground.saying.showing import brief

_SPREAD = frozenset(
    {"q_b_proj", "q_proj", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
)
_ELSEWHERE = frozenset({"vision", "projector"})
_EXPERTS = "routed experts"
_BF16 = 2  # bytes


class Memory(NamedTuple):
    """Bytes on each device, and of the host."""

    weights: int
    """Of the weights: those that tensor parallelism spreads by rows or columns by their share, all others whole."""
    absorbed: int
    """Of the two halves of `kv_b_proj` in BF16, which engines of MLA keep beside it."""
    cache: int | None
    """Of the latent keys and values of one sequence, which every device has whole; None: the config lacks its sizes."""
    context: int | None
    """Tokens of that sequence."""
    host: int = 0
    """Of routed experts that stay in the memory of the host."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    @property
    def needed(self) -> int:
        """Bytes on each device, as far as they can be told; activations and graphs come on top."""
        return self.weights + self.absorbed + (self.cache or 0)


def memory_needed(
    found: Subject,
    *,
    absorbs: bool = True,
    latent: bool = True,
    experts_on_host: bool = False,
    decoded: Collection[str] = (),
) -> Memory:
    """Return what each device needs to hold.

    A cached token is `kv_lora_rank + qk_rope_head_dim` numbers of BF16 in each layer, on each device whole: MLA's keys
    and values are one latent vector that all heads share (vLLM `MLAAttentionSpec`, `max_tp_shards=1`). transformers
    keeps those of each head instead.

    Args:
        found: the checkpoint, with its ranks and the tokens of a sequence.
        absorbs: whether the halves of `kv_b_proj` are kept beside it.
        latent: whether the cache holds latent vectors.
        experts_on_host: whether routed experts stay in the memory of the host.
        decoded: packings of weights that become BF16 as they are loaded.
    """
    served = [kind for kind in found.kinds if kind.served]
    here = [kind for kind in served if not (experts_on_host and kind.name == _EXPERTS)]
    absorbed = sum(_elements(kind) for kind in here if absorbs and kind.last == "kv_b_proj") * _BF16 // found.ranks
    host = sum(kind.nbytes for kind in served) - sum(kind.nbytes for kind in here)
    tokens = found.context or number(found.text, "max_position_embeddings")
    loaded = [kind._replace(nbytes=_elements(kind) * _BF16) if kind.packed in decoded else kind for kind in here]
    weights = sum(_share(kind, found.ranks) for kind in loaded)
    token = _token(found, latent=latent)
    return Memory(weights, absorbed, tokens * token if tokens and token else None, tokens, host)


def _token(found: Subject, *, latent: bool) -> int | None:
    """Return the bytes of a token's keys and values; None where not every layer keeps them, as in K3."""
    if found.found.of_k3:
        return None

    def product(*keys: str) -> int | None:
        """Return the first number times the sum of all others."""
        values = [number(found.text, key) for key in keys]
        return None if None in values else (values[0] or 0) * sum(value or 0 for value in values[1:])

    row = (
        product("num_hidden_layers", "kv_lora_rank", "qk_rope_head_dim")
        if latent
        else product("num_hidden_layers", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    heads = 1 if latent else number(found.text, "num_attention_heads")
    return row * heads * _BF16 if row and heads else None


def _elements(kind: Kind) -> int:
    """Return the weights of all of a kind."""
    return prod(kind.weight.shape) * (kind.nbytes // max(kind.weight.nbytes, 1))


def _share(kind: Kind, ranks: int) -> int:
    """Return a device's bytes of a kind of weights."""
    spread = kind.name in {"embedding", "head"} or (kind.last in _SPREAD and kind.name not in _ELSEWHERE)
    return -(-kind.nbytes // ranks) if spread else kind.nbytes
