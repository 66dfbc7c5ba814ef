"""What a checkpoint holds, and whether a conversion kept its promises: inspect, compare, verify."""
