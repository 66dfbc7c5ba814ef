"""GGUF, as llama.cpp reads it: blocks, names, keys, vocabulary, and the files that they lie in."""
