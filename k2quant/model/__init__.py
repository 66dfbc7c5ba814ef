"""Checkpoints as live models: packed weights that run on the fused kernels, whole or a layer at a time."""

from k2quant.ground.extras import needed

with needed("run", "running a model"):
    from k2quant.model.loading import load_model
    from k2quant.model.passes.streaming import LayerHooks, stream_forward
    from k2quant.model.saving import save_model

__all__ = ["LayerHooks", "load_model", "save_model", "stream_forward"]
