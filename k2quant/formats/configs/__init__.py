"""What a quantization block of config.json says: its keys, and the blocks of each tool."""
