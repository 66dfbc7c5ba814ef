"""MLX, as mlx-lm loads it without a transform: modes, names, config, and the shards that they lie in."""
