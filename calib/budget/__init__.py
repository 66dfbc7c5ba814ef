"""Bits where they count: which units of a checkpoint stay in FP8 or BF16 so that the whole has a given size."""
