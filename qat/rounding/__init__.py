"""What the forward pass sees: which weights are rounded, by which rule, with which gradient."""
