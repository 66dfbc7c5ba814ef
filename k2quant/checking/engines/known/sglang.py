"""What SGLang requires, by its release 0.5.23."""

from __future__ import annotations

from k2quant.checking.engines.asking import blocks, files, formats, matching, shapes, tensors
from k2quant.checking.engines.known.vllm import BLOCKS, GROUPS_OF_BLOCKS, GROUPS_OF_NVFP4, MODELOPT, PREFIXES
from k2quant.checking.engines.rule import Rule
from k2quant.formats.configs import compressed_tensors, modelopt
from k2quant.formats.fp8 import Fp8
from k2quant.formats.int4 import Int4
from k2quant.formats.mxfp4 import Mxfp4

VERSION = "0.5.23"
_QUANTIZATION = "sglang/srt/layers/quantization"
_GROUPS = f"{_QUANTIZATION}/compressed_tensors"
_LOADER = "sglang/srt/models/deepseek_common/deepseek_weight_loader.py"
_MODEL = "sglang/srt/models/deepseek_v2.py"
_FP8 = str(Fp8.method)
_TAKEN = (Int4.packing, BLOCKS, GROUPS_OF_BLOCKS, MODELOPT, GROUPS_OF_NVFP4)
_UNLOADED = {
    Mxfp4.packing: "its method for MXFP4 has a place for `weight` and none for `weight_packed`: these experts would "
    "stay as the memory was"
}

ARCHITECTURES = (
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "KimiK25ForConditionalGeneration",
)

RULES = (
    Rule("tensors", "loads each weight with its partners", _LOADER, tensors.whole),
    Rule(
        "architecture",
        "builds the model from the class that `architectures` names",
        f"{_MODEL} and kimi_k25.py, EntryClass",
        tensors.architecture(ARCHITECTURES),
    ),
    Rule(
        "model_type",
        "reads the config with a class of its own, or with the checkpoint's code",
        "sglang/srt/utils/hf_transformers/common.py",
        files.configuration(("kimi_k2", "kimi_k25", "kimi_k3", "deepseek_v3", "deepseek_v32")),
    ),
    Rule("sizes", "makes its parameters from the config, and copies tensors into them", _MODEL, shapes.sizes),
    Rule("promises", "leaves what no tensor fills as the memory was", _LOADER, tensors.promised),
    Rule(
        "names",
        "looks tensors up by their full names, after `language_model.layers.` became `language_model.model.layers.`",
        "sglang/srt/models/kimi_k25.py, hf_to_sglang_mapper",
        tensors.spelled(PREFIXES),
    ),
    Rule(
        "strangers",
        "warns of a name that it has no parameter for, and goes on",
        _LOADER,
        tensors.strangers(fatal=False),
    ),
    Rule(
        "index",
        "takes from the index which files to read, and loads all that is in them",
        "sglang/srt/model_loader/weight_utils.py, filter_duplicate_safetensors_files",
        tensors.listed(),
    ),
    Rule(
        "formats",
        "has a scheme for each format of experts and of linear layers",
        f"{_GROUPS}/compressed_tensors.py, get_moe_scheme; {_QUANTIZATION}/mxfp4.py; {_LOADER}",
        formats.taken(_TAKEN, _TAKEN, why=_UNLOADED),
    ),
    Rule(
        "format",
        "runs INT4 experts where the format of the whole block is theirs",
        f"{_GROUPS}/schemes/compressed_tensors_wNa16_moe.py",
        blocks.alone(Int4.packing),
    ),
    Rule(
        "fused",
        "asks for the format of a fused module once, of experts by the first",
        f"{_GROUPS}/compressed_tensors.py, get_moe_scheme; {_LOADER}",
        formats.fused(),
    ),
    Rule("unquantised", "gives router and embedding no quantization", f"{_MODEL}, MoEGate", formats.kept()),
    Rule(
        "kv_b_proj",
        "splits it in two for MLA, from whole numbers or from FP8",
        f"{_LOADER}, post_load_weights",
        formats.absorbed((BLOCKS, GROUPS_OF_BLOCKS)),
    ),
    Rule(
        "scales",
        "keeps scales of INT4 in BF16, and of blocks in float32",
        f"{_GROUPS}/schemes/compressed_tensors_wNa16_moe.py; {_QUANTIZATION}/fp8.py",
        formats.scaled_by({Int4.packing: ("BF16",), BLOCKS: ("F32",)}, exact=False),
    ),
    Rule(
        "inputs",
        "allocates scales of inputs where the config speaks of them",
        f"{_QUANTIZATION}/modelopt_quant.py",
        formats.inputs,
    ),
    Rule(
        "whole scales",
        "takes one scale for gate and up",
        f"{_QUANTIZATION}/modelopt_quant.py, ModelOptNvFp4FusedMoEMethod",
        formats.alike,
    ),
    Rule(
        "devices",
        "spreads heads, rows and columns evenly, and scales with them",
        f"{_MODEL}; {_QUANTIZATION}/fp8.py; {_GROUPS}/schemes/compressed_tensors_wNa16_moe.py",
        shapes.cut(),
    ),
    Rule(
        "block",
        "looks for it at the top level, and of K2.5 in text_config",
        "sglang/srt/model_loader/checkpoint_quantization.py",
        blocks.homed((blocks.TOP, blocks.OLDER, blocks.TEXT)),
    ),
    Rule(
        "one meaning",
        "reads one block, whichever it finds first",
        "sglang/srt/model_loader/checkpoint_quantization.py",
        tensors.sound,
    ),
    Rule(
        "method",
        "knows methods by name, and ModelOpt's algorithms",
        f"{_QUANTIZATION}/__init__.py; {_QUANTIZATION}/modelopt_quant.py, ModelOptFp4Config",
        blocks.method(
            (_FP8, compressed_tensors.METHOD, modelopt.METHOD),
            algorithms=(modelopt.WITH_INPUTS, modelopt.WEIGHTS_ONLY),
            exact=True,
        ),
    ),
    Rule(
        "blocks of FP8",
        "wants two numbers and dynamic activations",
        f"{_QUANTIZATION}/fp8.py, Fp8Config",
        blocks.blocked,
    ),
    Rule(
        "lists",
        "matches what is left as it is against its own names of modules, and does not know what `gate_up_proj` holds",
        f"{_GROUPS}/utils.py; {_QUANTIZATION}/utils.py; {_QUANTIZATION}/modelopt_quant.py, is_layer_excluded",
        blocks.agreeing(
            "fused_qkv_a_proj_with_mqa",
            {
                compressed_tensors.METHOD: matching.sglang_groups,
                _FP8: matching.sglang_blocks,
                modelopt.METHOD: matching.sglang_algorithm,
            },
            head=(modelopt.METHOD,),
        ),
    ),
    Rule(
        "tokenizer",
        "loads it with transformers, and its code where it is told to trust it",
        "sglang/srt/utils/hf_transformers",
        files.tokenizer,
    ),
    Rule(
        "chats",
        "renders chats with the checkpoint's template",
        "sglang/srt/entrypoints/openai/serving_chat.py",
        files.template,
    ),
)
