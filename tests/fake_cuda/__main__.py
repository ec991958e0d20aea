"""`python -m tests.fake_cuda MODULE ARGUMENTS`: run a module where CUDA is fake."""

import runpy
import sys

from tests.fake_cuda import load

load()

from tests.fake_cuda.device import FakeCuda  # noqa: E402: torch comes after the library

sys.argv = sys.argv[1:]
with FakeCuda():
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
