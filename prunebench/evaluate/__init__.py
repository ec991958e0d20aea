"""Evaluators: from a model to metrics, each under a protocol. They know nothing of pruners."""
