"""How the bytes of a source that is no local folder come, while something reads it."""
