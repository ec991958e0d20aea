"""Benchmarks that are run by themselves: on a GPU, or on models that fill a machine."""
