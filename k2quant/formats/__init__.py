"""The formats of a Kimi K2 weight: each says in one file what it is on disk, in memory and in a config."""
