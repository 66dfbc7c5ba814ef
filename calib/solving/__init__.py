"""Solving: weights that are moved to where rounding them hurts least, a layer at a time."""
