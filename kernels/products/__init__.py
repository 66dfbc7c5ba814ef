"""Matrix products on packed weights: linear layers and routed experts, on CPU and GPU."""
