"""What a config says: whose checkpoints are taken, what is promised, what goes along, and the config of an output."""
