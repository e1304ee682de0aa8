"""Benchmarks and the demo, run from the repository root: ``python -m benchmarks.demo``."""
