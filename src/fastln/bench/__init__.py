"""Benchmark suites: compare methods and engines on models and one dataset, with one process per run."""
