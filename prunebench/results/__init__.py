"""The shared table: what a result is, where results are kept, and how they are compared."""
