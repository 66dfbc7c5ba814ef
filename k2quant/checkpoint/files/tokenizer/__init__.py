"""The files of a tokenizer beside a checkpoint, read without torch, transformers or code of the checkpoint."""
