"""How stages are run: their processes, their time, their files, and the run that only proves the script."""
