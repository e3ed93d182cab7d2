"""Speed and memory, as ratios within one run: ``python -m benchmarks``. No test asserts any of it."""
