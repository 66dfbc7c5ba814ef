"""Which weight gets which format: a recipe as people write it, and as it is obeyed."""
