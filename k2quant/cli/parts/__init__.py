"""What commands share: options, how they show themselves, groups that load a command when it is asked for."""
