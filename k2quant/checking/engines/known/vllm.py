"""What vLLM requires, by its release 0.33.0. It has a method for every format that k2quant reads."""

from __future__ import annotations

from k2quant.checking.engines.asking import blocks, files, formats, matching, shapes, tensors
from k2quant.checking.engines.rule import Rule
from k2quant.checking.engines.subject import Kind, unit
from k2quant.formats.configs import compressed_tensors, modelopt
from k2quant.formats.fp8 import Fp8
from k2quant.formats.int4 import Int4
from k2quant.formats.nvfp4 import Nvfp4

VERSION = "0.33.0"
_QUANTIZATION = "vllm/model_executor/layers/quantization"
_GROUPS = f"{_QUANTIZATION}/compressed_tensors"
_MODEL = "vllm/model_executor/models/deepseek_v2.py"
_FP8 = str(Fp8.method)

BLOCKS, GROUPS_OF_BLOCKS = (f"{Fp8.packing} {layout}" for layout in Fp8.layouts)
"""Block FP8 by DeepSeek's names, and by compressed-tensors'."""

MODELOPT, GROUPS_OF_NVFP4 = (f"{Nvfp4.packing} {layout}" for layout in Nvfp4.layouts)
"""NVFP4 by ModelOpt's names, and by compressed-tensors'."""

ARCHITECTURES = (
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "KimiK25ForConditionalGeneration",
)

PREFIXES = {
    "KimiK25": ("language_model.model.", "language_model."),
    "Deepseek": ("model.",),
}
"""What stands before `layers.N.` in the names of an architecture's tensors."""

_FINEST = 32  # rows and columns that a block of an expert's scales is cut down to, at the least


def _refined(cut: shapes.Cut) -> str | None:
    """Say why a share of experts in block FP8 may run although it does not come out even."""
    if cut.kind.name != "routed experts" or cut.kind.packed != BLOCKS or cut.size % _FINEST:
        return None
    return f"Triton's kernels take blocks of experts cut down to {_FINEST} rows and more, others do not"


def _head(kind: Kind) -> bool:
    return kind.name == "head" and unit(kind.weight.format)[0] == 1


RULES = (
    Rule("tensors", "loads each weight with its partners", f"{_MODEL}, load_weights", tensors.whole),
    Rule(
        "architecture",
        "builds the model from the class that `architectures` names",
        "vllm/model_executor/models/registry.py",
        tensors.architecture(ARCHITECTURES, by_type=("deepseek_v3",)),
    ),
    Rule(
        "model_type",
        "reads the config with a class of its own, or with the checkpoint's code",
        "vllm/transformers_utils/config.py",
        files.configuration(("kimi_k2", "kimi_k25", "kimi_k3", "deepseek_v3", "deepseek_v32")),
    ),
    Rule("sizes", "makes its parameters from the config, and copies tensors into them", _MODEL, shapes.sizes),
    Rule("promises", "leaves what no tensor fills as the memory was", f"{_MODEL}, load_weights", tensors.promised),
    Rule(
        "names",
        "looks tensors up by their full names, after `language_model.layers.` became `language_model.model.layers.`",
        "vllm/model_executor/models/kimi_k25.py, hf_to_vllm_mapper",
        tensors.spelled(PREFIXES),
    ),
    Rule("strangers", "stops at a name that it has no parameter for", _MODEL, tensors.strangers(fatal=True)),
    Rule(
        "index",
        "takes from the index which files to read, and loads all that is in them",
        "vllm/model_executor/model_loader/weight_utils.py, filter_duplicate_safetensors_files",
        tensors.listed(),
    ),
    Rule("experts", "looks for the tensors of each expert", f"{_MODEL}, load_weights", tensors.separate),
    Rule(
        "fused",
        "asks for the format of a fused module once, of experts by the first",
        f"{_GROUPS}/compressed_tensors_moe/compressed_tensors_moe.py, get_moe_method; {_MODEL}, packed_modules_mapping",
        formats.fused(),
    ),
    Rule(
        "unquantised",
        "gives router and embedding no quantization",
        f"{_MODEL}, GateLinear; {_GROUPS}/compressed_tensors.py, get_quant_method",
        formats.kept(doubtful=_head),
    ),
    Rule(
        "kv_b_proj",
        "splits it in two for MLA, from whole numbers or from FP8; of others it multiplies by a unit matrix",
        f"{_QUANTIZATION}/utils/quant_utils.py, get_and_maybe_dequant_weights",
        formats.absorbed((BLOCKS,), others="it is multiplied by a unit matrix, which a kernel may not do exactly"),
    ),
    Rule(
        "scales",
        "keeps scales of INT4 in BF16, and of blocks in float32",
        f"{_GROUPS}/compressed_tensors_moe/compressed_tensors_moe_wna16.py; {_QUANTIZATION}/fp8.py",
        formats.scaled_by({Int4.packing: ("BF16",), BLOCKS: ("F32",)}, exact=False),
    ),
    Rule(
        "inputs",
        "allocates scales of inputs where the config speaks of them",
        f"{_QUANTIZATION}/modelopt.py",
        formats.inputs,
    ),
    Rule(
        "whole scales",
        "takes one scale for gate and up, and warns where they differ",
        f"{_QUANTIZATION}/modelopt.py, ModelOptNvFp4FusedMoE",
        formats.alike,
    ),
    Rule(
        "devices",
        "spreads heads, rows and columns evenly, and scales with them",
        f"{_MODEL}; {_QUANTIZATION}/utils/fp8_utils.py, validate_fp8_block_shape; "
        f"{_GROUPS}/compressed_tensors_moe/compressed_tensors_moe_wna16.py; "
        "vllm/model_executor/layers/fused_moe/oracle/fp8.py, refine_fp8_moe_block_shape",
        shapes.cut(doubtful=_refined),
    ),
    Rule(
        "block",
        "looks for it at the top level, then in text_config",
        "vllm/transformers_utils/model_arch_config_convertor.py, get_quantization_config",
        blocks.homed((blocks.TOP, blocks.OLDER, blocks.TEXT, blocks.OLDER_TEXT)),
    ),
    Rule(
        "one meaning",
        "reads one block, whichever it finds first",
        "vllm/transformers_utils/model_arch_config_convertor.py",
        tensors.sound,
    ),
    Rule(
        "method",
        "knows methods by name, and ModelOpt's algorithms",
        f"{_QUANTIZATION}/__init__.py; {_QUANTIZATION}/modelopt.py, LINEAR_ALGOS",
        blocks.method(
            (_FP8, compressed_tensors.METHOD, modelopt.METHOD), algorithms=(modelopt.WITH_INPUTS, modelopt.WEIGHTS_ONLY)
        ),
    ),
    Rule(
        "blocks of FP8",
        "wants two numbers and dynamic activations",
        f"{_QUANTIZATION}/fp8.py, Fp8Config",
        blocks.blocked,
    ),
    Rule("column order", "takes no columns out of their order", f"{_GROUPS}/compressed_tensors.py", blocks.ordered),
    Rule(
        "KV cache",
        "takes FP8 with one symmetric scale for each layer or head",
        f"{_GROUPS}/compressed_tensors.py, CompressedTensorsKVCacheMethod",
        blocks.cached,
    ),
    Rule(
        "lists",
        "matches what is left as it is against its own names of modules",
        f"{_GROUPS}/utils.py; {_QUANTIZATION}/utils/{{config,quant}}_utils.py; {_QUANTIZATION}/modelopt.py",
        blocks.agreeing(
            "fused_qkv_a_proj",
            {
                compressed_tensors.METHOD: matching.vllm_groups,
                _FP8: matching.vllm_blocks,
                modelopt.METHOD: matching.vllm_algorithm,
            },
            head=(modelopt.METHOD,),
        ),
    ),
    Rule(
        "tokenizer",
        "loads it with transformers, and its code where it is told to trust it",
        "vllm/tokenizers",
        files.tokenizer,
    ),
    Rule("chats", "renders chats with the checkpoint's template", "vllm/entrypoints/chat_utils.py", files.template),
)
