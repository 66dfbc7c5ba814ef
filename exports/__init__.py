"""A checkpoint for engines that read other files: GGUF for llama.cpp, and what mlx-lm loads."""

from k2quant.exports.gguf.export import GgufExport, export_gguf, look_ahead_gguf
from k2quant.exports.gguf.plan import GgufPlan, make_gguf_plan
from k2quant.exports.gguf.reading import ReadBack, read_back_gguf
from k2quant.exports.gguf.types import GgufOptions
from k2quant.exports.mlx.export import MlxExport, export_mlx, look_ahead_mlx
from k2quant.exports.mlx.plan import MlxPlan, make_mlx_plan

__all__ = [
    "GgufExport",
    "GgufOptions",
    "GgufPlan",
    "MlxExport",
    "MlxPlan",
    "ReadBack",
    "export_gguf",
    "export_mlx",
    "look_ahead_gguf",
    "look_ahead_mlx",
    "make_gguf_plan",
    "make_mlx_plan",
    "read_back_gguf",
]
