"""How work gets onto a device: threads of a CPU, launches and rounding of Triton on a GPU."""
