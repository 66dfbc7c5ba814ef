"""How the package speaks: of arguments, of how far work is, of results in a line."""
