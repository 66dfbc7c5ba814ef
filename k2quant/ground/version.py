"""The version of k2quant, as reports and journals note it."""

__version__ = "0.1.0"
