"""The mathematics, free of I/O: transforms of logits, random numbers, mixtures of distributions."""
