"""Products on a CPU: straight from packed bytes, or by panels."""
