"""The steps: loss, teacher, optimizers, processes, and what is watched on the way."""
