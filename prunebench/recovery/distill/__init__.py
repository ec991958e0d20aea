"""Distillation of a pruned model from the dense one, with the mask fixed."""
