"""The peers that solve: who they are, and the process that each runs in."""
