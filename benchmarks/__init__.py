"""Benchmarks: peers and shapes, a table of both (compare.py), and suites for asv."""
