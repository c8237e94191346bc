"""Hours of training, and whether anything grows."""
