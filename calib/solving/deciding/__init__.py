"""How one matrix is decided on: what is believed of its input, ways of rounding it, and who judges between them."""
