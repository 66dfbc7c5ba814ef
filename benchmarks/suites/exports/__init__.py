"""Exports: what other engines make of them, and what they save."""
