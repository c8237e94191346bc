"""Time the parts of a run: ring, weights, collector, workers, the fast simulator step."""
