"""What GGUF's metadata says of a tokenizer, from the files that lie beside a checkpoint."""

from k2quant.exports.gguf.vocabulary.keys import vocabulary

__all__ = ["vocabulary"]
