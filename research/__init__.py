"""What reproduces papers and figures: run from a clone, not installed."""
