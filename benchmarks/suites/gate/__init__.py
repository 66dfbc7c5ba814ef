"""Of gate.py: a population of answers, cells, rules and their page."""
