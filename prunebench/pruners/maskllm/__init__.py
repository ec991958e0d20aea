"""MaskLLM: N:M masks that are learned end to end, and the published ones (arXiv 2409.17481)."""
