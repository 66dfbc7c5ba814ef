"""What a report says of how scales, codes and bits were chosen: read, trusting nothing in it."""
