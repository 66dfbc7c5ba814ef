"""The version of k2quant, as reports and journals note it."""

VERSION = "0.1.0"
