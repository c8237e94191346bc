"""What all benchmarks share: settings and records, verdicts, pages."""
