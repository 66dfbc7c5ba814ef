"""Quantised weights as the matrix products read them: a module for each format."""
