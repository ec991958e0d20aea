"""prunebench: prune language models with any published method, and find out what it cost."""

__version__ = "0.1.0"
