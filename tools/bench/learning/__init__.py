"""Learning curves of both modes and of stale data on a task."""
