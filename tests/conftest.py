"""Every test has its own cache and no network; tiny models stand in for real ones."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

import pytest

import tests.checked  # noqa: F401  pyproject.toml names it as what checks types

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny matrices: threads would wait for each other
if "torch" in sys.modules:
    sys.modules["torch"].set_num_threads(1)


@pytest.fixture(autouse=True)
def _isolated(request, tmp_path, monkeypatch):
    """A cache of its own for each test, and no settings of the developer's."""
    for name in list(os.environ):
        if name.startswith("PRUNEBENCH_") and "real" not in request.keywords:
            monkeypatch.delenv(name)
    if not getattr(request.module, "INTERPRETED", False):
        # set by the tests of the kernels when they are collected; it would serve every CPU, slowly
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if "real" not in request.keywords:
        monkeypatch.setenv("PRUNEBENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def byte_tokenizer():
    """A tokenizer of 256 tokens, one a byte; the zero byte ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="Ā")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, byte_tokenizer) -> Path:
    """A tiny Llama with a byte tokenizer, saved as a model folder. Read only."""
    from prunebench.testing import tiny_model

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_model("llama").save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def held(tiny_folder):
    """What a user of Python has: model and tokenizer, loaded from the folder by transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture
def alone(tmp_path):
    """Where and how a command runs: its own cache, one thread."""
    cache = {"PRUNEBENCH_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    return {"cwd": tmp_path, "env": {**os.environ, **cache}}


BOS = 254


@pytest.fixture(scope="session")
def bos_tokenizer(byte_tokenizer):
    """The byte tokenizer with a token, `BOS`, that it puts before every text."""
    import copy

    from tokenizers import processors

    tokenizer = copy.deepcopy(byte_tokenizer)
    token = tokenizer.convert_ids_to_tokens(BOS)
    tokenizer.bos_token = token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, BOS)]
    )
    return tokenizer


@pytest.fixture(scope="session")
def gemma_folder(tmp_path_factory, bos_tokenizer) -> Path:
    """A tiny Gemma 3 whose tokenizer adds BOS, saved as a model folder. Read only."""
    from prunebench.testing import tiny_model

    folder = tmp_path_factory.mktemp("models") / "tiny-gemma"
    tiny_model("gemma3").save_pretrained(folder)
    bos_tokenizer.save_pretrained(folder)
    return folder


_PANGRAMS = """the quick brown fox jumps over a lazy dog while seven wizards judge my vow to buy
quartz jigs and pack five dozen liquor jugs for the boxing match on sunday morning"""


def prose(characters: int, *, seed: int) -> str:
    """Make text of about so many characters, different for every seed."""
    import random

    rng = random.Random(seed)
    words: list[str] = []
    while sum(map(len, words)) < characters:
        words.append(rng.choice(_PANGRAMS.split()))
    return " ".join(words)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """Text for calibration, 20,000 characters."""
    path = tmp_path_factory.mktemp("texts") / "calibration.txt"
    path.write_text(prose(20_000, seed=1), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def eval_file(tmp_path_factory) -> Path:
    """Other text, for perplexity, 4,000 characters."""
    path = tmp_path_factory.mktemp("texts") / "eval.txt"
    path.write_text(prose(4_000, seed=2), encoding="utf-8")
    return path


KINDS = {"llama", "gpt2", "bloom", "mixtral"}  # linears, Conv1D, fused, experts


def slow_beyond(quick, names):
    """Parametrise over all names; those beyond the quick ones are slow by mark."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture
def tiny_run(tiny_folder, text_file, eval_file, tmp_path):
    """Options of a run on the tiny model that takes a fraction of a second."""
    return [
        "run", "--model", str(tiny_folder), "--calibration", f"file:{text_file}",
        "--calibration-samples", "4", "--seqlen", "32", "--ppl", f"file:{eval_file}",
        "--ppl-seqlen", "64", "--results-dir", str(tmp_path / "results"),
    ]  # fmt: skip


@functools.cache
def command_of(app):
    from typer.main import get_command

    return get_command(app)


@pytest.fixture
def cli(monkeypatch, tmp_path):
    """Run the command line in this process, in a folder of its own; returns the outcome."""
    import typer.testing

    from prunebench.cli import app

    monkeypatch.setattr(typer.testing, "_get_command", command_of)  # built once, not every time
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    monkeypatch.chdir(work)

    def invoke(*arguments: str, code: int = 0):
        outcome = typer.testing.CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert outcome.exit_code == code, f"{outcome.exit_code}: {outcome.output}"
        assert "Traceback" not in outcome.output
        return outcome

    return invoke


@pytest.fixture
def loopback(monkeypatch, tmp_path):
    """A hub on loopback that this process uses, with an empty cache."""
    from tests.hub import loopback_hub

    with loopback_hub(monkeypatch, tmp_path / "hf") as hub:
        yield hub
