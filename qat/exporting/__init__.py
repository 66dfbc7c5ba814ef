"""A trained model as a checkpoint, behind a gate of equal bits."""
