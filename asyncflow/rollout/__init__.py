"""Collecting: policy, simulators, ring, weights."""
