"""Measure how much time overlapping collection and training saves, and what it costs."""
