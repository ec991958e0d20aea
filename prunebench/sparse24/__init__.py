"""2:4 for real: a packed format, layers that run it, and what that buys, measured."""
