"""One checkpoint into another: which weight gets which format, the plan, and the stream that carries it out."""
