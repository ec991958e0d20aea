"""Kernels that multiply by a packed 2:4 matrix: `protocol` is their contract, `table` the list."""
