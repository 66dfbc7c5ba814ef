"""What llama.cpp's own converter requires of a checkpoint, which makes the GGUF file that it runs."""

from __future__ import annotations

from k2quant.checking.engines.asking import blocks, files, formats, shapes, tensors
from k2quant.checking.engines.known.vllm import BLOCKS, GROUPS_OF_BLOCKS, GROUPS_OF_NVFP4, MODELOPT
from k2quant.checking.engines.rule import Rule
from k2quant.formats.configs import compressed_tensors, modelopt
from k2quant.formats.fp8 import Fp8
from k2quant.formats.int4 import Int4

VERSION = "0c1e57098"
_BASE = "conversion/base.py (0c1e57098)"
_MODEL = "conversion/deepseek.py (0c1e57098), DeepseekV2Model"
_TAKEN = (Int4.packing, BLOCKS, GROUPS_OF_BLOCKS, MODELOPT, GROUPS_OF_NVFP4)

RULES = (
    Rule("tensors", "dequantises each weight by its partners", f"{_BASE}, dequant_model", tensors.whole),
    Rule(
        "architecture",
        "has a class for each architecture",
        _MODEL,
        tensors.architecture(("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "KimiK25ForConditionalGeneration")),
    ),
    Rule("sizes", "writes the config's sizes into the file, and shapes kv_b_proj by them", _MODEL, shapes.sizes),
    Rule("promises", "waits for all experts of a layer before it writes them", _MODEL, tensors.promised),
    Rule(
        "index",
        "stops where the names of index and shards differ",
        f"{_BASE}, index_tensors",
        tensors.listed(by_name=True),
    ),
    Rule("experts", "stacks the tensors of each expert", f"{_MODEL}, modify_tensors", tensors.separate),
    Rule("formats", "dequantises these formats", f"{_BASE}, dequant_model", formats.taken(_TAKEN, _TAKEN)),
    Rule(
        "block",
        "looks for it at the top level, with text_config laid over it",
        f"{_BASE}, load_hparams",
        blocks.homed((blocks.TOP, blocks.TEXT)),
    ),
    Rule("one meaning", "reads one block", f"{_BASE}, load_hparams", tensors.sound),
    Rule(
        "method",
        "knows methods by name, and ModelOpt's algorithms",
        f"{_BASE}, dequant_model and prepare_tensors",
        blocks.method(
            (str(Fp8.method), compressed_tensors.METHOD, modelopt.METHOD),
            algorithms=(modelopt.WITH_INPUTS, modelopt.WEIGHTS_ONLY),
            exact=True,
        ),
    ),
    Rule(
        "one group",
        "takes one config group of compressed-tensors, but for NVFP4",
        f"{_BASE}, dequant_model",
        blocks.single,
    ),
    Rule(
        "tokenizer",
        "takes ranks from the tokenizer's own code, by transformers",
        f"{_MODEL}, set_vocab",
        files.tokenizer,
    ),
    Rule(
        "chats",
        "writes the chat template into the file",
        "gguf-py/gguf/vocab.py (0c1e57098), SpecialVocab",
        files.template,
    ),
)
