"""Env steps per second of LIBERO's tasks, beside the benchmark's own loop."""
