"""Tool calls as evidence: requests with tools, the calls that a model made of them, and whether they are right."""
