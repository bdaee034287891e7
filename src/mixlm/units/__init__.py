"""What members share a distribution over: tokens, pieces, words or bytes."""
