"""Models: where their weights come from, and the walker that visits their blocks."""
