"""The kernels that multiply by a packed 2:4 matrix: `protocol` defines, `table` lists them."""
