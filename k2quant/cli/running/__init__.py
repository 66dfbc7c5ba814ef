"""Commands that run a model's products: text from a checkpoint, and the fastest kernels of this GPU."""
