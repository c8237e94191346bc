"""`asyncflow profile`: what overlap gives, and what limits it."""
