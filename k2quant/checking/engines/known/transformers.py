"""What transformers requires, by its release 5.23.0."""

from __future__ import annotations

from k2quant.checking.engines.asking import blocks, files, formats, shapes, tensors
from k2quant.checking.engines.known.vllm import BLOCKS, GROUPS_OF_BLOCKS, GROUPS_OF_NVFP4
from k2quant.checking.engines.rule import Rule
from k2quant.formats.configs import compressed_tensors
from k2quant.formats.fp8 import Fp8
from k2quant.formats.int4 import Int4
from k2quant.formats.mxfp4 import Mxfp4

VERSION = "5.23.0"
_GROUPS = "transformers/integrations/compressed_tensors.py"
_MODEL = "transformers/models/deepseek_v3/modeling_deepseek_v3.py"
_TAKEN = (Int4.packing, Mxfp4.packing, BLOCKS)
_EVERYTHING = (*_TAKEN, GROUPS_OF_BLOCKS, GROUPS_OF_NVFP4)

DECODED = (Int4.packing, Mxfp4.packing)
"""Packings of experts that become BF16 as they are loaded."""

_LOST = {
    GROUPS_OF_NVFP4: "experts lose their weight_global_scale as they are fused (huggingface/transformers#48371)",
    GROUPS_OF_BLOCKS: "experts in FP8 are multiplied by their scales element by element, which blocks are not",
}

RULES = (
    Rule("tensors", "loads each weight with its partners", "transformers/core_model_loading.py", tensors.whole),
    Rule(
        "model_type",
        "has classes for these, and else runs the checkpoint's own code, which was written for older versions",
        "transformers/models/auto/auto_mappings.py",
        files.configuration(("deepseek_v3", "kimi_k25"), code_runs=False),
    ),
    Rule("sizes", "makes its parameters from the config", _MODEL, shapes.sizes),
    Rule(
        "promises",
        "warns of what no tensor fills, and leaves it random",
        "transformers/modeling_utils.py",
        tensors.promised,
    ),
    Rule(
        "formats",
        "dequantises experts as it fuses them",
        f"{_GROUPS}; transformers/quantizers/auto.py",
        formats.taken(_TAKEN, _EVERYTHING, why=_LOST),
    ),
    Rule(
        "fused",
        "fuses the experts of a layer, by one scheme for all",
        f"{_GROUPS}, get_experts_scheme",
        formats.fused(experts_alone=True),
    ),
    Rule("unquantised", "has router and embedding unquantised", _MODEL, formats.kept()),
    Rule(
        "block",
        "looks for it at the top level, then in text_config",
        "transformers/quantizers/auto.py, get_hf_quantizer",
        blocks.homed((blocks.TOP, blocks.TEXT)),
    ),
    Rule("one meaning", "reads one block, whichever it finds first", "transformers/quantizers/auto.py", tensors.sound),
    Rule(
        "method",
        "knows methods by name",
        "transformers/quantizers/auto.py, AUTO_QUANTIZER_MAPPING",
        blocks.method((str(Fp8.method), compressed_tensors.METHOD)),
    ),
    Rule(
        "blocks of FP8",
        "wants weight_block_size",
        "transformers/quantizers/quantizer_finegrained_fp8.py",
        blocks.blocked,
    ),
    Rule(
        "tokenizer",
        "loads it, and its code with trust_remote_code",
        "transformers/models/auto/tokenization_auto.py",
        files.tokenizer,
    ),
    Rule(
        "chats",
        "renders chats with the checkpoint's template",
        "transformers/utils/chat_template_utils.py",
        files.template,
    ),
)
