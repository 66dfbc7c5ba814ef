"""The codecs on a GPU, in Triton."""
