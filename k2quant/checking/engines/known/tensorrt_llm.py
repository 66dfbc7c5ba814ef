"""What TensorRT-LLM requires of a checkpoint, by its PyTorch backend."""

from __future__ import annotations

from k2quant.checking.engines.asking import blocks, files, formats, matching, shapes, tensors
from k2quant.checking.engines.known.vllm import BLOCKS, GROUPS_OF_BLOCKS, GROUPS_OF_NVFP4, MODELOPT, PREFIXES
from k2quant.checking.engines.rule import Rule
from k2quant.formats.configs import compressed_tensors, modelopt
from k2quant.formats.fp8 import Fp8
from k2quant.formats.int4 import Int4
from k2quant.formats.mxfp4 import Mxfp4

VERSION = "main at 008e0af"
_CONFIG = "tensorrt_llm/_torch/model_config.py (008e0af)"
_GROUPS = "tensorrt_llm/models/quant_config_utils.py (21156a7)"
_MODEL = "tensorrt_llm/_torch/models/modeling_deepseekv3.py (000561d)"
_K25 = "tensorrt_llm/_torch/models/modeling_kimi_k25.py (010373d)"
_FP8 = str(Fp8.method)
_TAKEN = (Mxfp4.packing, BLOCKS, GROUPS_OF_BLOCKS, MODELOPT, GROUPS_OF_NVFP4)
_REFUSED = {Int4.packing: "of compressed-tensors' 4-bit weights it takes NVFP4 and MXFP4 alone"}

ARCHITECTURES = (
    "DeepseekV3ForCausalLM",
    "KimiK25ForConditionalGeneration",
)

RULES = (
    Rule("tensors", "loads each weight with its partners", _MODEL, tensors.whole),
    Rule(
        "architecture",
        "builds the model from the class that `architectures` names",
        "tensorrt_llm/_torch/models/_arch_index.py (065ff9e)",
        tensors.architecture(ARCHITECTURES),
    ),
    Rule("sizes", "makes its parameters from the config, and copies tensors into them", _MODEL, shapes.sizes),
    Rule("promises", "looks for each tensor by its name", _MODEL, tensors.promised),
    Rule("names", "strips `language_model.` of K2.5 from names and lists", _K25, tensors.spelled(PREFIXES)),
    Rule(
        "formats",
        "has an algorithm for each format",
        f"{_GROUPS}; {_CONFIG}",
        formats.taken(_TAKEN, _TAKEN, why=_REFUSED),
    ),
    Rule("fused", "holds experts, gate and up, q_a and kv_a in one module each", _MODEL, formats.fused()),
    Rule("unquantised", "has router, embedding and head unquantised", _MODEL, formats.kept()),
    Rule(
        "kv_b_proj",
        "leaves it out of every quantization but FP8's",
        f"{_CONFIG}, load_hf_quant_config",
        formats.absorbed((BLOCKS, GROUPS_OF_BLOCKS)),
    ),
    Rule("inputs", "reads scales of inputs where the algorithm is NVFP4", f"{_GROUPS}; {_CONFIG}", formats.inputs),
    Rule("whole scales", "takes one scale for gate and up", _MODEL, formats.alike),
    Rule("devices", "spreads heads, rows and columns evenly, unless attention is data-parallel", _MODEL, shapes.cut()),
    Rule(
        "block",
        "looks for it at the top level; what it makes of text_config depends on its config class",
        _CONFIG,
        blocks.homed((blocks.TOP, blocks.TEXT)),
    ),
    Rule("one meaning", "reads hf_quant_config.json before the block in config.json", _CONFIG, tensors.sound),
    Rule(
        "method",
        "knows methods by name, and ModelOpt's algorithms",
        f"{_CONFIG}, load_hf_quant_config; tensorrt_llm/quantization/modelopt_config.py (2edf354)",
        blocks.method(
            (_FP8, compressed_tensors.METHOD, modelopt.METHOD),
            algorithms=(modelopt.WITH_INPUTS, modelopt.WEIGHTS_ONLY),
            exact=True,
        ),
    ),
    Rule("blocks of FP8", "wants blocks of 128 x 128", f"{_CONFIG}, load_hf_quant_config", blocks.blocked),
    Rule("KV cache", "takes FP8 or nothing", f"{_GROUPS}, update_quant_config_from_compressed_tensors", blocks.cached),
    Rule(
        "lists",
        "matches patterns against whole names of its own modules",
        "tensorrt_llm/_torch/models/modeling_utils.py (000a01d), __post_init__",
        blocks.agreeing("kv_a_proj_with_mqa", {modelopt.METHOD: matching.tensorrt_algorithm}),
    ),
    Rule(
        "tokenizer", "loads it with transformers, and its code where it is told to trust it", _CONFIG, files.tokenizer
    ),
    Rule(
        "chats", "renders chats with the checkpoint's template", "tensorrt_llm/serve/openai_server.py", files.template
    ),
)
