"""The peers that write FP4: llm-compressor and ModelOpt's tensor code."""
