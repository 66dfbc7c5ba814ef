"""What NVFP4 and MXFP4 on the CPU share: rules in numpy, tables of them, and loops that look everything up there."""
