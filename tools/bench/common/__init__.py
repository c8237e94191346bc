"""The common parts of all benchmarks: settings and records, verdicts, pages."""
