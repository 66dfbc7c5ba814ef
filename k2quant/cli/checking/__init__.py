"""Commands that look at checkpoints and change nothing: inspect, verify, check, diff, report."""
