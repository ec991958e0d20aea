"""The parts: each has a function that takes a `Recorder` and measures."""
