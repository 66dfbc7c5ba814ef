"""What is solved on its way to a checkpoint: kept until its shard can be written, then written as it was solved."""
