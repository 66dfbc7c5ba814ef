"""How work gets onto a device: threads of a CPU, GPUs by name, launches and rounding of Triton."""
