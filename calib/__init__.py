"""Calibration: what data says of a model, so that its weights are rounded where it matters least.

Naming this package loads neither torch nor numpy.
"""
