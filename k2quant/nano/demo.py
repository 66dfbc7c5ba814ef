"""A small checkpoint in K2-Instruct's exact layout, and a tour of it through every format.

Names, dtypes, partners and config are those of moonshotai/Kimi-K2-Instruct; only the sizes are small. As in the real
model, 128 does not divide the rows of `kv_a_proj_with_mqa` (160 here, 576 there), and some scales lie in another shard
than their weights, as those of DeepSeek-V3 do.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from k2quant.checking.comparison import Finding
from k2quant.checking.verify import verify, verify_checksums
from k2quant.checkpoint.files.paths import refuse_foreign, write_whole
from k2quant.checkpoint.writing.in_memory import Shard, write_checkpoint
from k2quant.conversion.convert import convert
from k2quant.conversion.estimate import codec_rate
from k2quant.formats.known import FORMATS, FormatName
from k2quant.ground import names
from k2quant.ground.release import INSTRUCT_CONFIG, attention_shapes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LAYERS, DENSE_LAYERS, EXPERTS = 3, 1, 16
HIDDEN, DENSE, MOE, VOCABULARY = 512, 1024, 256, 2048
HEADS, NOPE, ROPE, VALUE, Q_RANK, KV_RANK = 4, 64, 64, 64, 256, 96

_ASTRAY = (7, 11)  # experts of layer 1 whose scales lie in the last shard

K2_CONFIG: dict[str, Any] = INSTRUCT_CONFIG | {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "first_k_dense_replace": DENSE_LAYERS,
    "hidden_size": HIDDEN,
    "intermediate_size": DENSE,
    "kv_lora_rank": KV_RANK,
    "moe_intermediate_size": MOE,
    "n_routed_experts": EXPERTS,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": HEADS,
    "q_lora_rank": Q_RANK,
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE,
    "v_head_dim": VALUE,
    "vocab_size": VOCABULARY,
}


def matrices(layer: int) -> dict[str, tuple[int, int]]:
    """Return the projections of a decoder layer by base, with their shapes `[out, in]`."""
    prefix = f"model.layers.{layer}."
    attention = attention_shapes(K2_CONFIG)
    mlps = [("mlp.", DENSE)]
    if layer >= DENSE_LAYERS:
        mlps = [("mlp.shared_experts.", MOE), *((f"mlp.experts.{expert}.", MOE) for expert in range(EXPERTS))]
    shapes = {f"{prefix}self_attn.{name}": shape for name, shape in attention.items()}
    for mlp, width in mlps:
        shapes |= {f"{prefix}{mlp}{name}": (width, HIDDEN) for name in ("gate_proj", "up_proj")}
        shapes[f"{prefix}{mlp}down_proj"] = (HIDDEN, width)
    return shapes


def write_k2(folder: Path, *, seed: int = 0) -> None:
    """Write the small checkpoint: block FP8, a shard a layer, with index, config and two files beside them.

    Args:
        folder: where; it is made if need be.
        seed: of the random weights.
    """
    import numpy as np

    from k2quant.formats.tensor import quantize

    random = np.random.default_rng(seed)
    shards: dict[str, Shard] = {f"model-{layer + 1}-of-{LAYERS}.safetensors": {} for layer in range(LAYERS)}
    first, last = (shards[f"model-{number}-of-{LAYERS}.safetensors"] for number in (1, LAYERS))
    first["model.embed_tokens.weight"] = ("BF16", _bf16(random, (VOCABULARY, HIDDEN)))
    for layer, shard in enumerate(shards.values()):
        shard |= dict(_plain_tensors(layer, random))
        for base, shape in matrices(layer).items():
            weight = quantize(_bf16(random, shape), "fp8", name=base)
            shard[f"{base}.weight"] = ("F8_E4M3", weight.codes)
            home = last if layer == DENSE_LAYERS and names.expert(base) in _ASTRAY else shard
            home[f"{base}.weight_scale_inv"] = ("F32", weight.scale)
    last["model.norm.weight"] = ("BF16", _ones(HIDDEN))
    last["lm_head.weight"] = ("BF16", _bf16(random, (VOCABULARY, HIDDEN)))
    write_checkpoint(folder, shards, K2_CONFIG)
    write_whole(folder / "generation_config.json", b'{"eos_token_id": 2, "max_length": 131072}\n')
    write_whole(folder / "tokenizer_config.json", b'{"model_max_length": 131072}\n')


def _plain_tensors(layer: int, random: np.random.Generator) -> Iterator[tuple[str, tuple[str, NDArray[Any]]]]:
    """Yield the tensors of a layer that no release quantises."""
    prefix = f"model.layers.{layer}."
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}{norm}.weight", ("BF16", _ones(HIDDEN))
    yield f"{prefix}self_attn.q_a_layernorm.weight", ("BF16", _ones(Q_RANK))
    yield f"{prefix}self_attn.kv_a_layernorm.weight", ("BF16", _ones(KV_RANK))
    yield f"{prefix}self_attn.rotary_emb.inv_freq", ("BF16", _bf16(random, (ROPE // 2,)))
    if layer >= DENSE_LAYERS:
        yield f"{prefix}mlp.gate.weight", ("BF16", _bf16(random, (EXPERTS, HIDDEN)))
        bias = random.standard_normal(EXPERTS).astype("float32")
        yield f"{prefix}mlp.gate.e_score_correction_bias", ("F32", bias)


def _bf16(random: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.uint16]:
    """Return normal weights of K2's initial spread as BF16 bits."""
    import numpy as np

    values = random.standard_normal(shape, np.float32) * np.float32(K2_CONFIG["initializer_range"])
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def _ones(size: int) -> NDArray[np.uint16]:
    import numpy as np

    return np.full(size, 0x3F80, np.uint16)


class Step(NamedTuple):
    """One conversion of the tour. A folder is named after the formats on the way to it."""

    source: str
    to: FormatName
    promise: str
    same_as: str | None = None
    """An earlier folder whose tensors this one must equal byte for byte."""

    @property
    def folder(self) -> str:
        """Where the step writes."""
        return f"{self.source}-{self.to}"


START = "fp8"
"""Where the checkpoint lies that the tour begins with."""

STEPS = (
    Step(START, "bf16", "bit-equal to code * scale"),
    Step("fp8-bf16", "fp8", "codes and scales of the source, byte for byte", "fp8"),
    Step("fp8", "int4", "within INT4 rounding"),
    Step("fp8-bf16", "int4", "the bytes of fp8-int4: the fused way equals the way through BF16", "fp8-int4"),
    Step("fp8-int4", "bf16", "bit-equal to code * scale"),
    Step("fp8-int4-bf16", "int4", "the bytes of fp8-int4: what lies on the grid stays there", "fp8-int4"),
    Step("fp8-int4", "fp8", "within FP8 rounding"),
    Step("fp8", "nvfp4", "within NVFP4 rounding"),
)


ROUNDED = STEPS[2]
"""The step that people ask for most: from the release's FP8 to INT4."""


class Outcome(NamedTuple):
    """What a step of the tour came to."""

    step: Step
    nbytes: int
    seconds: float
    findings: list[Finding]
    failures: dict[str, str]

    @property
    def errors(self) -> list[str]:
        """What rounding did to each of `CLASSES`, as the signal-to-noise ratio."""
        from k2quant.kernels.codecs.figures import Figures

        sums = dict.fromkeys(CLASSES, Figures())
        for finding in self.findings:
            kind = names.tensor_class(finding.name)
            if kind in sums and finding.figures is not None:
                sums[kind] += finding.figures
        return ["exact" if figures.exact else f"{figures.sqnr_db:.1f} dB" for figures in sums.values()]


CLASSES = {"routed experts": "experts", "shared experts": "shared", "dense mlp": "dense", "attention": "attn"}
"""The classes of tensors that the tour tells apart, with short names."""


def begin(folder: Path) -> Path:
    """Claim a folder, write the checkpoint into it and return where it lies.

    Raises:
        DestinationForeign: the folder holds something that no demo wrote.
    """
    _claim(folder)
    write_k2(folder / START)
    return folder / START


def compile_codecs() -> None:
    """Compile what converts between any two formats; later processes find it in a cache."""
    for source, target in permutations([kind.asked_for() for kind in FORMATS.values()], 2):
        codec_rate(source, target)


def tour(folder: Path) -> Iterator[Outcome]:
    """Take what `begin` wrote through every format and check each step."""
    for step in STEPS:
        yield _take(folder, step)


_MARK = "k2quant_demo.txt"


def _claim(folder: Path) -> None:
    """Make the folder and mark it as a demo's; refuse one that holds anything else."""
    refuse_foreign(folder, (_MARK,), "not empty, and no demo's", remedy="name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / _MARK, b"Everything in this folder was written by `k2quant demo`, which may replace it.\n")


def _take(folder: Path, step: Step) -> Outcome:
    """Convert, verify against the source and its checksums, and compare with the folder it must equal."""
    begun = time.perf_counter()
    done = convert(folder / step.source, folder / step.folder, to=step.to, restart=True)
    seconds = time.perf_counter() - begun
    checked = verify(folder / step.source, folder / step.folder)
    failures = {**checked.failures, **verify_checksums(folder / step.folder).failures}
    if step.same_as is not None:
        equal = verify(folder / step.same_as, folder / step.folder)
        failures |= {f.name: f"differs from {step.same_as}" for f in equal.findings if f.relation not in _EQUAL}
    return Outcome(step, done.report["bytes_written"], seconds, checked.findings, failures)


_EQUAL = ("bit-equal", "codes equal")
