"""What each engine requires: its rules, a file an engine."""
