"""Commands about where a checkpoint lies: up to a hub, and what a stopped run left at a place."""
