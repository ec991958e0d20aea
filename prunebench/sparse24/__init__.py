"""2:4 sparsity in storage and compute: packed weights, layers, kernels, choice of backend."""
