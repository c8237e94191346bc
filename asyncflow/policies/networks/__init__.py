"""Networks that policies are built from."""
