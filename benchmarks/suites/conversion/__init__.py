"""Of convert.py: sources, peers, bars, and the page of all benchmarks."""
