"""The three formats of a Kimi K2 weight: BF16, block-FP8 and INT4."""
