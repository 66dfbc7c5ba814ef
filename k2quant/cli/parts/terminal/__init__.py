"""What a terminal shows: bars and lines, tables that fit, colour, streams that may be closed."""
