"""Tests of what the benchmarks say: reading figures off samples, goals, files."""
