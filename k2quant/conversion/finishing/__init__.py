"""What is written when all shards stand: the report, the files beside the weights, index and config."""
