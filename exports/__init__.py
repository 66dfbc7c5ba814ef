"""A checkpoint for engines that read other files: GGUF for llama.cpp, and what mlx-lm loads."""
