"""Asking a model the questions of lm-eval, and keeping every answer."""
