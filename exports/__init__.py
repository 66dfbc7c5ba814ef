"""A checkpoint for engines that read other files: GGUF for llama.cpp, and what mlx-lm loads."""

from k2quant.exports.gguf.export import GgufExport, export_gguf, look_ahead_gguf
from k2quant.exports.gguf.plan import GgufPlan, make_gguf_plan
from k2quant.exports.gguf.reading import ReadBack, read_back_gguf
from k2quant.exports.gguf.types import GgufOptions

__all__ = [
    "GgufExport",
    "GgufOptions",
    "GgufPlan",
    "ReadBack",
    "export_gguf",
    "look_ahead_gguf",
    "make_gguf_plan",
    "read_back_gguf",
]
