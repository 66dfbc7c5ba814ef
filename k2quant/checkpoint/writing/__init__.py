"""Files out: a destination that has an owner, shards that are whole or not there, small checkpoints from memory."""
