"""Which configuration of a GPU kernel to use: one table for each architecture."""
