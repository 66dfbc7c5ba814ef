"""Make a table for the GPU at hand: choose candidates, compile, check, time."""
