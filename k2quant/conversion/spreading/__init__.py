"""One plan, many processes: who writes which shards, and how all of them write the same bytes."""
