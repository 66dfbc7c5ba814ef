"""A checkpoint for engines that read other files: GGUF for llama.cpp, and what mlx-lm loads."""

from k2quant.exports.gguf.export import GgufExport, export_gguf, look_ahead
from k2quant.exports.gguf.plan import GgufPlan
from k2quant.exports.gguf.plan import make_plan as make_gguf_plan
from k2quant.exports.gguf.types import Options as GgufOptions
from k2quant.exports.mlx.export import MlxExport, export_mlx, look_ahead_mlx
from k2quant.exports.mlx.plan import MlxPlan
from k2quant.exports.mlx.plan import make_plan as make_mlx_plan

__all__ = [
    "GgufExport",
    "GgufOptions",
    "GgufPlan",
    "MlxExport",
    "MlxPlan",
    "export_gguf",
    "export_mlx",
    "look_ahead",
    "look_ahead_mlx",
    "make_gguf_plan",
    "make_mlx_plan",
]
