"""What the parts of a run cost: ring, weights, collector, workers, the fast simulator step."""
