"""What a calibration knows of a checkpoint, in a folder of safetensors and JSON."""
