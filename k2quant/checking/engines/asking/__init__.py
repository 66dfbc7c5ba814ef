"""What rules ask of a checkpoint: names, formats, shapes, the config, the files. What engines answer, `known` has."""
