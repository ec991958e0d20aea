"""Bytes and speed of a pruned checkpoint, measured beside the dense model."""
