"""Many machines: what a cluster costs beside one machine, and what the whole of K2 takes on paper."""
