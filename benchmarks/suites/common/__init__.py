"""What all benchmarks say of themselves: machine, versions, cost of a command."""
