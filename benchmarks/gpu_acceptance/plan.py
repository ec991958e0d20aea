"""The parts, most valuable first, and how long each may take."""

from __future__ import annotations

from dataclasses import dataclass

BUDGET = 540.0
"""Seconds of a whole run."""

LEAST = 8.0
"""A part with fewer seconds left is not started: importing torch alone takes some."""


@dataclass(frozen=True)
class Part:
    """One process of the run.

    Attributes:
        name: For `--only`.
        title: What it measures.
        seconds: Its limit.
        target: The function that measures, `module:name`; called with a `Recorder`.
    """

    name: str
    title: str
    seconds: float
    target: str


def _part(name: str, title: str, seconds: float, target: str) -> Part:
    return Part(name, title, seconds, f"benchmarks.gpu_acceptance.parts.{target}")


PARTS = (
    _part("machine", "versions, what is missing, copy and matmul ceilings", 30, "machine:run"),
    _part("correct", "CPU = GPU for every CUDA path", 60, "correct:run"),
    _part("capture", "which backend can be captured in a CUDA graph", 25, "capture:run"),
    _part("decode", "layers, 1 to 64 tokens, against cuBLAS", 90, "layers:decode"),
    _part("prefill", "layers, 512 and 2,048 tokens, with cuSPARSELt", 60, "layers:prefill"),
    _part("end-to-end", "a random LLaMA-2-7B, dense and packed", 80, "end_to_end:run"),
    _part("pruning", "Wanda, SparseGPT, ALPS, GBLM at 7B shapes, by stage", 100, "pruning:run"),
    _part("maskllm", "a step of MaskLLM at 7B shapes against a dense one", 90, "maskllm:run"),
    _part("memory", "disk prefetch, and batches that are halved out of memory", 30, "memory:run"),
    _part("after", "clocks after the run", 15, "machine:after"),
)
