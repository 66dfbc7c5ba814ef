"""Parts of `mutants.py`: which modules, which changes, which tests, how they run, and what changes nothing."""
