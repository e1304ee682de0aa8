"""What is checked on a GPU; `benchmarks.gpu` has it done."""
