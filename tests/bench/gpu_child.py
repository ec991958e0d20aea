"""A part's process for the tests of the runner: no torch, and a device that can be lost."""

import importlib
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from benchmarks.gpu_acceptance.record import Recorder

CONTEXT = {"error": ""}


def fine(record):
    with record.step("first"):
        record.add("value", value=1.5)


def crash(record):
    record.add("value", value=2.5)
    raise RuntimeError("libcuda.so cannot be loaded\nand more lines")


def hang(record):
    record.add("value", value=3.5)
    time.sleep(600)


def step_that_fails(record):
    with record.step("wrong"):
        raise ValueError("no algorithm")
    with record.step("after"):
        record.add("value", value=4.5)


def lose_the_context(record):
    with record.step("before"):
        record.add("value", value=5.5)
    with record.step("kernel"):
        CONTEXT["error"] = "RuntimeError: CUDA error: an illegal memory access was encountered"
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    with record.step("never"):
        record.add("value", value=6.5)


def no_gpu(record):
    record.add("environment", gpu=None)
    record.add("problem", why="no NVIDIA driver", costs="nothing can be measured", fatal=True)


if __name__ == "__main__":
    part, target, log, seconds, *_ = sys.argv[1:]
    module, _, name = target.partition(":")
    record = Recorder(
        part, Path(log), SimpleNamespace(type="cpu"), False, float(seconds),
        context_error=lambda device: importlib.import_module(module).CONTEXT["error"],
    )  # fmt: skip
    getattr(importlib.import_module(module), name)(record)
