"""`make gpu-acceptance`: what the project promises on a GPU, measured in nine minutes on one.

Every part is a process of its own with a time limit, and what it measures is written at once: a
part that crashes, hangs or loses its CUDA context costs its own figures only.
"""
