"""What other engines make of exports, asked in environments of their own."""
