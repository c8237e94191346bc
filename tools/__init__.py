"""Benchmarks, checks and makers of shipped files. They run from the repository's root: `python -m tools.NAME`."""
