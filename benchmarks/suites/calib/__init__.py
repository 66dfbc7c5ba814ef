"""The proof of calibration on nano-K2: what each method does to outputs and answers, beside its peers, and how fast."""
