"""The peers of the search: who they are, and the process that they run in."""
