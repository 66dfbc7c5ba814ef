"""Which scales a group of INT4 may have beside the plain rule's: one that loses nothing, or one that loses less."""
