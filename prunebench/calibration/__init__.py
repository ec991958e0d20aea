"""Calibration: texts, the windows of tokens sampled from them, and the statistics of inputs."""
