"""What overlap gives, and what limits it."""
