"""What overlapping collection and training gives, and what it costs."""
