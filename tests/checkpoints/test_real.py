"""A packed folder of the real default model: loaded in a fresh process, memory, same tokens."""

import json
import os
import subprocess
import sys

import pytest
import torch

from prunebench.checkpoints.packed24 import copy_companions, dense_tensors, write_packed
from prunebench.models.load import load_model, load_tokenizer
from prunebench.models.source import fetch_model, find_model
from prunebench.models.walker import BlockWalker
from prunebench.progress import Silent
from prunebench.pruners import METHODS
from prunebench.sparsity import Sparsity

pytestmark = pytest.mark.real

FRESH = """
import json, sys
import prunebench
from transformers import AutoModelForCausalLM, AutoTokenizer
import torch

def megabytes(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1000

folder, prompt = sys.argv[1:]
inputs = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt")
import transformers.models.llama.modeling_llama  # before memory is measured
before = megabytes("RssAnon")  # not the pages of the weight files, which the system can drop
model = AutoModelForCausalLM.from_pretrained(folder)
tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)
print(json.dumps({"tokens": tokens.tolist(), "allocated": megabytes("RssAnon") - before,
                  "footprint": model.get_memory_footprint() / 1e6}))
"""


def test_a_fresh_process_loads_it_in_less_memory_than_dense_and_says_the_same(tmp_path):
    local = fetch_model(find_model("smollm2-135m-q4"), Silent())
    model = load_model(local.path, dtype=torch.bfloat16, device=torch.device("cpu"))
    walker = BlockWalker(model)
    METHODS.make("magnitude", {}).prune(
        walker, {linear.name: Sparsity.parse("2:4") for linear in walker.linears}
    )
    for name in ("dense", "packed"):
        (tmp_path / name).mkdir()
    copy_companions(local.path, tmp_path / "dense")
    model.save_pretrained(tmp_path / "dense")
    copy_companions(tmp_path / "dense", tmp_path / "packed")
    tensors = dense_tensors(tmp_path / "dense")
    packing = write_packed(tensors, tmp_path / "packed", progress=Silent())
    assert len(packing.packed) == 210
    prompt = "The capital of France is"
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path / "packed"), prompt],
        # without a compiler `reference` multiplies, which rounds as the dense product does
        capture_output=True, text=True, check=False, env={**os.environ, "CXX": "no-compiler"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    fresh = json.loads(done.stdout)
    inputs = load_tokenizer(local.path)(prompt, return_tensors="pt")
    assert fresh["tokens"] == model.generate(**inputs, max_new_tokens=24, do_sample=False).tolist()
    dense = model.get_memory_footprint() / 1e6
    saved = (packing.dense_bytes - packing.packed_bytes) / 1e6
    assert fresh["footprint"] == pytest.approx(dense - saved, rel=0.01)
    assert fresh["allocated"] < dense, fresh
