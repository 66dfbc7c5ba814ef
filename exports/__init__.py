"""A checkpoint for engines that read other files: GGUF for llama.cpp, and what mlx-lm loads."""

from k2quant.exports.gguf.export import GgufExport, export_gguf, look_ahead
from k2quant.exports.gguf.plan import GgufPlan
from k2quant.exports.gguf.plan import make_plan as make_gguf_plan
from k2quant.exports.gguf.types import Options as GgufOptions

__all__ = ["GgufExport", "GgufOptions", "GgufPlan", "export_gguf", "look_ahead", "make_gguf_plan"]
