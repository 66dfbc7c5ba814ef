"""What a run leaves on the disk: its folder, history, summary, checkpoints and state by name."""
