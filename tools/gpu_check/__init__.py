"""Check on a GPU what the tests check on a CPU."""
