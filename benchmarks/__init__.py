"""Benchmarks: peers and shapes, tables of both (compare.py), and suites for asv."""
