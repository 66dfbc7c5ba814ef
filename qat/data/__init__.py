"""What is learnt from: files of examples, as rows of tokens."""
