"""What KTransformers requires: routed experts on the CPU, all else on GPUs by its fork of SGLang."""

from __future__ import annotations

from k2quant.checking.engines.asking import blocks, files, formats, matching, shapes, tensors
from k2quant.checking.engines.known.vllm import BLOCKS, PREFIXES
from k2quant.checking.engines.rule import Rule
from k2quant.formats.configs import compressed_tensors
from k2quant.formats.fp8 import Fp8
from k2quant.formats.int4 import Int4

VERSION = "main at 95009ea"
_LOADER = "kt-kernel/python/utils/loader.py (95009ea)"
_WRAPPER = "kt-kernel/python/utils/amx.py (95009ea)"
_FORK = "sglang-kt, its fork of SGLang; read in SGLang 0.5.23"
_SERVED = "doc/en/Kimi-K2.5.md and doc/en/kt-kernel/Kimi-K2-Thinking-Native.md (95009ea)"
_FP8 = str(Fp8.method)

ARCHITECTURES = ("DeepseekV3ForCausalLM", "KimiK25ForConditionalGeneration")

RULES = (
    Rule("tensors", "loads each weight with its partners", _LOADER, tensors.whole),
    Rule("architecture", "has guides for these models", _SERVED, tensors.architecture(ARCHITECTURES)),
    Rule("sizes", "makes its parameters from the config", _FORK, shapes.sizes),
    Rule("promises", "counts experts until one is missing", f"{_LOADER}, load_experts", tensors.promised),
    Rule(
        "names",
        "looks below `model.layers.N.` and `language_model.model.layers.N.`",
        _LOADER,
        tensors.spelled({"KimiK25": ("language_model.model.",), **PREFIXES}),
    ),
    Rule("experts", "looks for the tensors of each expert", f"{_LOADER}, load_experts", tensors.separate),
    Rule(
        "formats",
        "reads INT4 as it is by the method RAWINT4, block FP8 by FP8 and BF16 by BF16",
        f"{_WRAPPER}, _create_loader",
        formats.taken((Int4.packing, BLOCKS), (Int4.packing, BLOCKS)),
    ),
    Rule("fused", "runs all experts of a layer in one kernel", _WRAPPER, formats.fused()),
    Rule("unquantised", "gives router and embedding no quantization", _FORK, formats.kept()),
    Rule("kv_b_proj", "splits it in two for MLA, from whole numbers or from FP8", _FORK, formats.absorbed((BLOCKS,))),
    Rule(
        "scales",
        "wants scales of INT4 in BF16",
        f"{_WRAPPER}, RAWINT4",
        formats.scaled_by({Int4.packing: ("BF16",)}, exact=True),
    ),
    Rule("devices", "spreads what GPUs hold evenly", _FORK, shapes.cut()),
    Rule(
        "block",
        "looks for it at the top level, and of K2.5 in text_config",
        _FORK,
        blocks.homed((blocks.TOP, blocks.OLDER, blocks.TEXT)),
    ),
    Rule("one meaning", "reads one block, whichever it finds first", _FORK, tensors.sound),
    Rule("method", "knows methods by name", _FORK, blocks.method((_FP8, compressed_tensors.METHOD))),
    Rule(
        "lists",
        "matches what is left as it is against its own names of modules",
        _FORK,
        blocks.agreeing(
            "fused_qkv_a_proj_with_mqa",
            {compressed_tensors.METHOD: matching.sglang_groups, _FP8: matching.sglang_blocks},
        ),
    ),
    Rule("tokenizer", "loads it with transformers, and its code where it is told to trust it", _FORK, files.tokenizer),
    Rule("chats", "renders chats with the checkpoint's template", _FORK, files.template),
)
