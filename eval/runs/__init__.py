"""Runs of benchmarks as they lie on the disk: items, samples, who was asked what."""
