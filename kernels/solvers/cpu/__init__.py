"""The solver's loops on the CPU, compiled by numba."""
