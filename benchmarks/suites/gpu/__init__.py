"""Of gpu.py: what is done on the day a GPU is there, stage by stage, and the page about it."""
