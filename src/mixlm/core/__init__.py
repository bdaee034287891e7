"""The mathematics, pure: transforms of logits, random numbers, sums of distributions."""
