"""What the benchmarks measured: as JSON, as tables and as charts."""
