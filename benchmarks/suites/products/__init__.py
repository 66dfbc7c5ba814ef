"""Of kernels.py: cells, contestants, goals and their page."""
