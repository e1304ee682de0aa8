"""The acceptance test of a GPU host: ``python -m benchmarks.gpu``, or ``ci/gpu``."""
