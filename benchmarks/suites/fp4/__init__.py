"""FP4: what it costs in accuracy, and how fast it is made beside its peers."""
