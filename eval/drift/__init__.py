"""How far a candidate drifts from its baseline, and which tensors carry it."""
