"""OpenAI-style servers: many requests under way, dropped connections survived, keys kept to the headers."""
