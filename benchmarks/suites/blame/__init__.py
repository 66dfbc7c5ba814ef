"""Of blame.py: damage of known place."""
