"""nano-K2: a K2 in everything but size, trained from scratch in minutes on a CPU, so that accuracy can be measured."""
