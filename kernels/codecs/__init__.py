"""From BF16 to codes and back: a reference in torch, loops for the CPU, Triton for the GPU, all with the same bits."""
