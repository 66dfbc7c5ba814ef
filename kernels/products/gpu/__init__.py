"""Products on a GPU, in Triton."""
