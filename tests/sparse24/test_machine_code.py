"""The kernels' machine code for chips that are not here: instructions per word, pipelines, spills.

A kernel that issues too many instructions is bound by them, and slower than the dense product
whatever it saves in bytes. No GPU is needed to see that: Triton's own assembler compiles for it.
"""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

if sys.platform != "linux" or platform.machine() != "x86_64":
    pytest.skip("Triton is made for Linux on x86_64", allow_module_level=True)

# Two registers of a thread, where three tokens of float16 take all 80.
SPILLED = {(80, "fp16", 3): 8, (89, "fp16", 3): 8}
BUDGET = {1: 14, 2: 21, 3: 28, 4: 35}  # instructions per word by tokens
INTEGER_SHARE = 0.55  # sm_100 adds and multiplies two pairs at once, so it is larger there
# An H200: 132 multiprocessors of four schedulers at 1.755 GHz, and the bandwidth of a copy.
SCHEDULERS, HERTZ, BYTES_A_SECOND = 132 * 4, 1.755e9, 4.3e12
WORD_BYTES, DENSE_BYTES = 4.5, 8  # of a group of four, packed and dense


def compile_all(*arguments):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.scripts.compile_kernels", *arguments],
        cwd=Path(__file__).parents[2], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_within_budget(kernel):
    words, tokens = kernel["words"], kernel["tokens"]
    assert kernel["loop"] >= 8 * words, "the loop that was found is not the whole one"
    assert kernel["loop"] <= BUDGET[tokens] * words
    assert kernel["integer"] <= INTEGER_SHARE * kernel["loop"]
    assert kernel["integer"] <= (4 + 2.5 * tokens) * words
    assert kernel["spilled"] == SPILLED.get((kernel["chip"], kernel["dtype"], tokens), 0)
    # Words come in 16 bytes a copy, and nothing in the loop waits for global memory.
    assert kernel["asynchronous"] >= words // 4 and kernel["direct"] == 0
    assert kernel["shared"] <= 48 << 10, "an A100 or L4 runs two blocks per multiprocessor or more"
    # Issue slots of a word beside the time of its bytes; a warp is 32 words wide.
    issue = kernel["loop"] / words / 32 / (SCHEDULERS * HERTZ)
    integer = kernel["integer"] / words / 16 / (SCHEDULERS * HERTZ)  # half of the lanes
    dense = DENSE_BYTES / BYTES_A_SECOND
    assert max(issue, integer) < (0.5 if tokens == 1 else 0.7) * dense
    if tokens == 1:
        assert max(issue, integer) < 0.6 * WORD_BYTES / BYTES_A_SECOND, "not bound by memory"


@pytest.mark.slow
def test_the_kernels_are_bound_by_memory():
    kernels = compile_all()
    products = [kernel for kernel in kernels if kernel["kernel"] == "multiply"]
    assert [k["chip"] for k in products if k["tokens"] == 1] == [80, 89, 90, 100, 90]
    for kernel in products:
        assert_within_budget(kernel)
    (unpack,) = (kernel for kernel in kernels if kernel["kernel"] == "unpack")
    # Reads 4.5 bytes a word and writes 8: the budget is wider.
    assert unpack["loop"] <= 24 * unpack["words"] and unpack["spilled"] == 0


@pytest.mark.slow
def test_every_number_of_tokens_on_every_chip():
    kernels = compile_all("all")
    assert len(kernels) == 2 * 4 * 4 + 4 + 1
    for kernel in kernels:
        if kernel["kernel"] == "multiply":
            assert_within_budget(kernel)
