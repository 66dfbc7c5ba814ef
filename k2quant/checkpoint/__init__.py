"""Files in, files out: folders of safetensors shards with an index, read and written without torch."""
