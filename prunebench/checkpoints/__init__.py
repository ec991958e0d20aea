"""Folders of models: saved, inspected, converted and exported; packed and quantized forms read."""
