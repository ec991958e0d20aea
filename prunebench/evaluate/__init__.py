"""Evaluators: metrics of a model, each under a protocol. They do not depend on pruners."""
