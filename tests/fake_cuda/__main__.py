"""`python -m tests.fake_cuda MODULE ARGUMENTS`: run a module where CUDA is fake."""

import runpy
import sys

from tests.fake_cuda import load


def main() -> None:
    load()
    from tests.fake_cuda.device import FakeCuda  # with torch: after the library

    sys.argv = sys.argv[1:]
    with FakeCuda():
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
