"""Commands that look at checkpoints and change nothing: inspect, verify, diff, report."""
