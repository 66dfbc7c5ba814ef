"""Sizes: those of the config against the tensors, and each device's share of a matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from k2quant.checking.engines.rule import Outcome, Test, failed, passed, unknown
from k2quant.checking.engines.subject import Kind, Subject, number, unit
from k2quant.formats.format import listed
from k2quant.ground import names
from k2quant.ground.release import attention_shapes
from k2quant.ground.units import counted

KEYS = (
    "hidden_size",
    "intermediate_size",
    "kv_lora_rank",
    "moe_intermediate_size",
    "n_routed_experts",
    "n_shared_experts",
    "num_attention_heads",
    "num_experts_per_tok",
    "num_hidden_layers",
    "q_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "vocab_size",
)
"""Sizes from which engines build the model. One that is missing gets DeepSeek-V3's own, without a word."""

_ROWS = frozenset({"q_b_proj", "q_proj", "kv_b_proj"})
_MERGED = frozenset({"gate_proj", "up_proj", "w1", "w3"})
_OUT = frozenset({"down_proj", "w2"})

RANKS = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of devices that are tried where nobody names one."""


class Cut(NamedTuple):
    """A matrix that devices cannot share evenly."""

    kind: Kind
    size: int
    """Its rows or columns."""
    step: int
    """Those that share a scale on one device."""
    what: str
    """Rows or columns."""


def sizes(found: Subject) -> Outcome:
    """Look whether the config has every size, and the same as the tensors."""
    missing = [key for key in KEYS if number(found.text, key) is None]
    if missing == ["q_lora_rank"] and found.text.get("q_lora_rank", 0) is None:
        missing = []  # a model without compression of queries says so
    if missing:
        return failed(
            f"lacks {listed(missing)}, or has no positive number there: DeepSeek-V3's own would be taken",
            file="config.json",
            remedy="take the config that belongs to these tensors",
        )
    return _against_tensors(found)


def _against_tensors(found: Subject) -> Outcome:
    expected = _expected(found)
    for kind in found.kinds:
        place = names.place(kind.weight.base)
        if place is None or not kind.served or not names.is_projection(kind.weight.base):
            continue
        key = place[1] if kind.name == "attention" else f"{kind.name}.{'out' if kind.last in _OUT else 'in'}"
        wanted = expected.get(key)
        if wanted is not None and kind.weight.shape != wanted:
            return failed(
                "by the sizes in config.json",
                tensor=kind.weight.main.name,
                expected=wanted,
                found=kind.weight.shape,
                remedy="take the config that belongs to these tensors",
            )
    return passed("matrices have the sizes that the config says")


def _expected(found: Subject) -> dict[str, tuple[int, int]]:
    """Return rows and columns of each kind of matrix, by the config, whose sizes are there."""
    config = {key: number(found.text, key) or 0 for key in KEYS}
    hidden = config["hidden_size"]
    widths = {
        "routed experts": config["moe_intermediate_size"],
        "shared experts": config["moe_intermediate_size"] * config["n_shared_experts"],
        "dense mlp": config["intermediate_size"],
    }
    attention = attention_shapes(config) if config["q_lora_rank"] else {}
    shapes = {f"self_attn.{name}": shape for name, shape in attention.items()}
    for kind, wide in widths.items():
        shapes |= {f"{kind}.in": (wide, hidden), f"{kind}.out": (hidden, wide)}
    return shapes


def cut(*, doubtful: Callable[[Cut], str | None] = lambda _: None) -> Test:
    """Return a test of each device's share of the matrices.

    Rows of `q_b_proj`, `kv_b_proj`, gate and up are spread, and columns of `o_proj` and down; heads stay whole, and so
    does what shares a scale.

    Args:
        doubtful: why an engine may take a share that does not come out even, if it may.
    """

    def test(found: Subject) -> Outcome:
        heads = number(found.text, "num_attention_heads")
        if heads is None:
            return unknown("config.json does not say how many heads there are")
        shares = _shares(found)
        fit = [ranks for ranks in RANKS if heads % ranks == 0 and not any(_uneven(shares, ranks))]
        fits = f"tensor parallelism of {listed(fit)} comes out even" if fit else "no tensor parallelism comes out even"
        if heads % found.ranks:
            return failed(
                "num_attention_heads",
                file="config.json",
                expected=f"a multiple of {found.ranks}, the devices of tensor parallelism",
                found=heads,
                remedy=fits,
            )
        wrong = sorted(_uneven(shares, found.ranks), key=lambda each: doubtful(each) is not None)
        if not wrong:
            return passed(fits)
        first = wrong[0]
        if (why := doubtful(first)) is not None:
            return unknown(
                f"`{first.kind.weight.main.name}`: {found.ranks} x {first.step} does not divide {first.size}; {why}"
            )
        return failed(
            f"spread over {counted(found.ranks, 'device')}",
            tensor=first.kind.weight.main.name,
            expected=f"{first.what} that {found.ranks} x {first.step} divides",
            found=first.size,
            remedy=f"{fits}; experts may be spread whole instead (expert parallelism)",
        )

    return test


def _shares(found: Subject) -> list[Kind]:
    """Return the kinds of matrices that are cut."""
    return [
        kind
        for kind in found.kinds
        if kind.served and len(kind.weight.shape) == 2 and names.is_projection(kind.weight.base)
    ]


def _uneven(shares: Sequence[Kind], ranks: int) -> Iterator[Cut]:
    """Yield the matrices that devices cannot share evenly."""
    for kind in shares:
        (rows, columns), (down, across) = kind.weight.shape, unit(kind.weight.format)
        merged = kind.last in _MERGED
        if kind.last == "q_a_proj" and rows % down:
            yield Cut(kind, rows, down, "rows")  # what is laid below it would begin within a block
        if kind.last in _ROWS or merged:
            step = down if ranks > 1 or merged else 1
            if rows % (ranks * step):
                yield Cut(kind, rows, step, "rows")
        if kind.last in _OUT or kind.last == "o_proj":
            step = across if ranks > 1 else 1
            if columns % (ranks * step):
                yield Cut(kind, columns, step, "columns")
