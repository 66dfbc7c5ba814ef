"""The parts of `compare_checkouts.py`: what is run, how, what may differ, and what does."""
