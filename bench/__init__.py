"""Benchmarks: python -m bench.run, then python -m bench.report. What: bench/cases.py."""
