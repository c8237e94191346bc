"""Benchmarks: each folder measures one question and writes its page under `docs/benchmarks/`."""
