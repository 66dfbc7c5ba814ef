"""Of model.py: checkpoints, contestants and their page."""
