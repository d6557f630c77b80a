"""Benchmarks: `python -m benchmarks.NAME` writes benchmarks/results/NAME.jsonl and .png."""
