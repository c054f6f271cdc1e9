"""Benchmarks: `python -m benchmarks`. Each run states its hardware and versions."""
