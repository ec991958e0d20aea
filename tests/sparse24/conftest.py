"""The kernels for a CPU, compiled once per file of tests."""

import functools

import pytest

from prunebench.sparse24.backends import cpu_build
from prunebench.sparse24.backends.cpu_build import build


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Kernels by instruction set, compiled once; the tests' own caches are empty."""
    folder = tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_build, "library_folder", lambda: folder)
        # The same numbers, compiled in half the time.
        patch.setattr(cpu_build, "_FLAGS", [*cpu_build._FLAGS, "-O1"])
        yield functools.cache(build)
