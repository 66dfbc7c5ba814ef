"""The proof of GPTQ on nano-K2, its peers on the same model, and its rates."""
