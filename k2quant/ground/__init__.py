"""What everything else stands on: names and sizes of Kimi K2, units, threads, intervals."""
