"""Which tensors there are, and what they are called."""

from __future__ import annotations

from collections.abc import Collection

from k2quant.checking.engines.rule import Outcome, Test, failed, passed, unknown
from k2quant.checking.engines.subject import Kind, Subject
from k2quant.conversion.metadata.config import quantization_blocks, quantization_of
from k2quant.conversion.metadata.promises import broken_promises, overruled
from k2quant.errors import CheckpointError
from k2quant.ground import names
from k2quant.ground.units import counted

_OWN_PREFIX = ("model.",)
_BUFFERS = ("rotary_emb.inv_freq",)


def whole(found: Subject) -> Outcome:
    """Look whether tensors fit together: each weight with its partners, of the right shapes and dtypes."""
    if found.problems:
        more = f" ({len(found.problems)} such problems)" if len(found.problems) > 1 else ""
        return Outcome("fail", f"{found.problems[0]}{more}")
    return passed(f"{counted(len(found.checkpoint.tensors), 'tensor')}, each weight with its partners")


def promised(found: Subject) -> Outcome:
    """Look whether all layers, experts and parts that the config promises are there."""
    if found.checkpoint.config is None:
        return failed("is missing", file="config.json", remedy="take it from the model's release")
    harmless = set(overruled(found.config, found.found))
    broken = [text for text in broken_promises(found.config, found.found) if text not in harmless]
    lost = [text for text in broken if "num_nextn_predict_layers" not in text]
    if broken:
        return Outcome("fail", lost[0]) if lost else unknown(broken[0])
    return passed("every layer and expert that the config promises")


def spelled(expected: dict[str, tuple[str, ...]]) -> Test:
    """Return a test of how decoder layers are spelled.

    Args:
        expected: for an architecture, or a beginning of its name, what may stand before `layers.N.`.
    """

    def test(found: Subject) -> Outcome:
        architecture = _architecture(found) or ""
        wanted = next((each for name, each in expected.items() if architecture.startswith(name)), _OWN_PREFIX)
        for kind in found.kinds:
            prefix = names.spelling(kind.weight.main.name)
            if prefix is not None and prefix not in wanted:
                return failed(
                    f"a layer of {architecture or 'a model without `architectures`'}",
                    tensor=kind.weight.main.name,
                    expected=" or ".join(f"`{each}layers.`" for each in wanted),
                    found=f"`{prefix}layers.`",
                    remedy="take the config that belongs to these tensors, or rename them",
                )
        return passed("decoder layers are spelled as the architecture has them")

    return test


def _architecture(found: Subject) -> str | None:
    listed = found.config.get("architectures")
    first = listed[0] if isinstance(listed, list) and listed else None
    return first if isinstance(first, str) else None


def architecture(known: Collection[str], *, by_type: Collection[str] = ()) -> Test:
    """Return a test of `architectures`.

    Args:
        known: those that the engine registers.
        by_type: values of `model_type` by which it finds its class where there are no `architectures`.
    """

    def test(found: Subject) -> Outcome:
        said = _architecture(found)
        if said in known:
            return passed(f"{said} is registered")
        if said is None and found.config.get("model_type") in by_type:
            return unknown(f"no `architectures`; they may follow from model_type {found.config['model_type']!r}")
        return failed(
            "architectures",
            file="config.json",
            expected=" or ".join(sorted(known)),
            found=repr(said)[:200] if said is not None else "none",
            remedy="take the config of the model's release",
        )

    return test


def strangers(*, fatal: bool) -> Test:
    """Return a test for tensors that no module of the engine has a place for.

    Args:
        fatal: whether the engine ends with an error there; else it warns and leaves them out.
    """

    def test(found: Subject) -> Outcome:
        strange = [kind.weight.main.name for kind in found.kinds if _is_strange(kind)]
        if not strange:
            return passed("no tensor that K2 does not have")
        text = f"{counted(len(strange), 'kind')} of tensors that K2 does not have, such as `{strange[0][:200]}`"
        if fatal:
            return failed(text, remedy="take them out of the index and the shards, or serve it as the model that it is")
        return unknown(f"{text}: they are left out with a warning, and what they were for is lost")

    return test


def _is_strange(kind: Kind) -> bool:
    weight = kind.weight
    matrix = weight.format is not None and len(weight.shape) > 1 and names.is_unknown_matrix(weight.base)
    return matrix or (kind.name == "other" and not weight.main.name.endswith(_BUFFERS))


def listed(*, by_name: bool = False) -> Test:
    """Return a test for tensors in the shards that the index does not look for there.

    Args:
        by_name: whether the engine compares the names of the index with those of the shards, and stops where they
            differ; else it loads all that is in a shard.
    """

    def test(found: Subject) -> Outcome:
        stale, unlisted = found.checkpoint.stale, found.checkpoint.unlisted
        if not unlisted:
            return passed("every tensor of the shards is where the index looks for it")
        if stale:
            return failed(
                f"an old copy of it lies in another shard ({counted(len(stale), 'such copy', 'such copies')}), and "
                "which of the two is loaded depends on the order of the files",
                tensor=stale[0],
                remedy="write the checkpoint anew: k2quant convert --shard-size leaves such copies out",
            )
        what = "the names of the index and of the shards must be the same" if by_name else "all that is there is loaded"
        return failed(
            f"lies in a shard and not in the index ({counted(len(unlisted), 'such tensor')}); {what}",
            tensor=unlisted[0],
            remedy="write the checkpoint anew: k2quant convert --shard-size leaves such tensors out",
        )

    return test


def separate(found: Subject) -> Outcome:
    """Look whether each routed expert has tensors of its own, as every release has them."""
    for shard in found.checkpoint.shards.values():
        for name in shard.tensors:
            if names.fused_experts(name) is not None:
                return failed(
                    "all experts of a layer in one tensor, as transformers 5 keeps them",
                    tensor=name,
                    expected="`mlp.experts.0.gate_proj.weight` and so on",
                    remedy="k2quant convert writes each expert by itself, in the same format too",
                )
    return passed("each expert has tensors of its own")


def sound(found: Subject) -> Outcome:
    """Look whether config.json contradicts itself in its homes for quantization."""
    try:
        blocks = quantization_blocks(found.config)
        quantization_of(found.config)
    except CheckpointError as error:
        return Outcome("fail", str(error))
    return passed(f"{counted(len(blocks), 'block')}, one meaning" if blocks else "no block")
