"""Exact statistics of paired answers, with nothing of models or files in it."""
