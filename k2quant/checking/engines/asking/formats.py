"""In which formats weights are stored, one by one and where engines hold several in one module."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from k2quant.checking.engines.rule import Outcome, Test, failed, passed, unknown
from k2quant.checking.engines.subject import Kind, Subject
from k2quant.checking.shared import unlike_scales
from k2quant.conversion.metadata.carrying import unscaled
from k2quant.conversion.metadata.config import check_source
from k2quant.errors import CheckpointError
from k2quant.formats.format import listed
from k2quant.ground import engines, names
from k2quant.ground.units import counted

_KEPT = frozenset({"router", "embedding", "head", "norm", "mtp"})
_PLAINLY = "BF16, F16 or F32"


def taken(experts: Collection[str], others: Collection[str], *, why: Mapping[str, str] | None = None) -> Test:
    """Return a test of the formats that an engine takes.

    Args:
        experts: how routed experts may be packed, as `subject.packed` says it.
        others: how all other matrices may be.
        why: what is worth saying of one that may not.
    """

    def test(found: Subject) -> Outcome:
        for kind in found.quantised:
            known = experts if kind.name == "routed experts" else others
            if kind.packed not in known:
                return failed(
                    (why or {}).get(kind.packed, ""),
                    tensor=kind.weight.main.name,
                    expected=listed(sorted(known)),
                    found=f"{kind.label} ({kind.packed})",
                    remedy="k2quant convert writes it in a format that this engine takes",
                )
        return passed(listed(sorted({kind.packed for kind in found.quantised})) or "nothing is quantised")

    return test


def fused(*, experts_alone: bool = False) -> Test:
    """Return a test of what engines hold in one module: it must be stored alike.

    Args:
        experts_alone: whether routed experts are all that this engine fuses.
    """

    def test(found: Subject) -> Outcome:
        splits = engines.splits(
            (weight.base, weight.format.label)
            for weight in found.weights
            if weight.format is not None and (not experts_alone or names.is_routed_expert(weight.base))
        )
        if splits:
            more = f" ({len(splits)} such groups)" if len(splits) > 1 else ""
            return failed(
                f"{splits[0]}{more}",
                remedy="convert it with scopes and patterns that keep them together, and without `allow_split=`",
            )
        return passed("what is fused has one format")

    return test


def kept(*, doubtful: Callable[[Kind], bool] = lambda _: False) -> Test:
    """Return a test of what engines do not run quantised: the router, embedding and head, norms.

    Args:
        doubtful: tells what they may run all the same.
    """

    def test(found: Subject) -> Outcome:
        for kind in sorted((kind for kind in found.quantised if kind.name in _KEPT), key=doubtful):
            if doubtful(kind):
                return unknown(f"`{kind.weight.main.name}` is {kind.label}: it depends on the kernel chosen at start")
            return failed(
                tensor=kind.weight.main.name,
                expected=_PLAINLY,
                found=kind.label,
                remedy="convert it anew from a source that has it unquantised",
            )
        return passed("router, embedding, head and norms are not quantised")

    return test


def absorbed(takes: Collection[str], *, others: str | None = None) -> Test:
    """Return a test of `kv_b_proj`, whose two halves MLA multiplies into its neighbours.

    Args:
        takes: how it may be packed, besides not at all.
        others: why it cannot be told of other packings whether they run; None: they do not.
    """

    def test(found: Subject) -> Outcome:
        for kind in found.quantised:
            if kind.last != "kv_b_proj" or kind.packed in takes:
                continue
            if others is not None:
                return unknown(f"`{kind.weight.main.name}` is {kind.label}: {others}")
            return failed(
                "MLA absorbs this matrix as it is loaded",
                tensor=kind.weight.main.name,
                expected=listed(sorted({"BF16", *takes})),
                found=kind.label,
                remedy="keep it out of the conversion with `ignore=`",
            )
        return passed("kv_b_proj is as MLA absorbs it")

    return test


def scaled_by(dtypes: Mapping[str, Collection[str]], *, exact: bool) -> Test:
    """Return a test of the dtypes of scales.

    Args:
        dtypes: for each packing those that its parameter takes.
        exact: whether the engine stops at another; else it converts, which may round.
    """

    def test(found: Subject) -> Outcome:
        for kind in found.quantised:
            known, stored = dtypes.get(kind.packed), kind.weight.format
            entry = kind.weight.parts.get(stored.scale_suffix or "") if stored else None
            if known is None or entry is None or entry.dtype in known:
                continue
            if exact:
                return failed(
                    tensor=entry.name,
                    expected=listed(known),
                    found=entry.dtype,
                    remedy="k2quant convert writes scales as the releases have them",
                )
            return unknown(
                f"`{entry.name}` is {entry.dtype}, and the parameter {listed(known)}: it is converted as it is loaded, "
                "and may be rounded"
            )
        return passed("scales have the dtypes of their parameters")

    return test


def inputs(found: Subject) -> Outcome:
    """Look whether a scale of the inputs stands beside each weight where the config has inputs quantised by one."""
    try:
        check_source(found.config, found.weights)
    except CheckpointError as error:
        return unknown(f"what the config says of inputs is not clear: {error}")
    missing = unscaled(found.config, found.weights)
    if missing:
        return failed(
            f"the config has inputs quantised by a scale that is not there ({counted(len(missing), 'such weight')}); "
            "the engine computes with what its memory held",
            tensor=missing[0],
            remedy="convert it anew, with `activation_scales=` or without: the config then says which",
        )
    return passed("what the config says of inputs has its scales")


def alike(found: Subject) -> Outcome:
    """Look whether matrices that are laid into one have one scale of the whole matrix; it reads these scales."""
    together = [weight for weight in found.weights if weight.format is not None and weight.format.together]
    if not together:
        return passed("no format with a scale of a whole matrix")
    if found.remote:
        return unknown("scales of whole matrices are data, and of a checkpoint at an address headers alone are read")
    try:
        unlike = unlike_scales(found.checkpoint, together)
    except CheckpointError as error:
        return Outcome("fail", str(error))
    if unlike:
        name, (_, other) = next(iter(unlike.items()))
        return failed(
            f"another scale of the whole matrix than `{other}`, and one is taken for both "
            f"({counted(len(unlike), 'such weight')})",
            tensor=name,
            remedy="k2quant convert writes one for both",
        )
    return passed("gate and up, q_a and kv_a have one scale of the whole matrix each")
