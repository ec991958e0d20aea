"""Divergence from the dense model: the definition, token by token, and no change at all."""

import json

import pytest
import torch

from prunebench.evaluate.divergence import Divergence
from prunebench.evaluate.perplexity import prepare_perplexity
from prunebench.progress import Silent
from prunebench.testing import tiny_model


@pytest.fixture
def text(byte_tokenizer, eval_file):
    return prepare_perplexity(
        f"file:{eval_file}", byte_tokenizer, seqlen=32, limit_tokens=160, vocabulary=256,
        progress=Silent(),
    )  # fmt: skip


def silent(done):
    pass


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_equals_the_definition(architecture, text):
    model = tiny_model(architecture)
    with torch.no_grad():
        before = model(input_ids=text.windows).logits[:, :-1].double().softmax(-1)
        reference = Divergence.of_dense(model, text, advance=silent)
        for name, parameter in model.named_parameters():
            if "mlp" in name and parameter.dim() == 2:
                parameter[:, ::2] = 0
        after = model(input_ids=text.windows).logits[:, :-1].double().softmax(-1)
    outcome = reference.score(model, advance=silent)
    each = (before * (before.log() - after.log())).sum(-1)
    assert outcome.measures["kl_divergence"].value == pytest.approx(each.mean().item(), rel=1e-3)
    changed = (before.argmax(-1) != after.argmax(-1)).double().mean().item()
    assert 0 < changed < 1
    assert outcome.measures["top1_changed"].value == pytest.approx(changed)
    for item, window in zip(outcome.items, each, strict=True):
        assert item.values["kl_divergence"] == pytest.approx(window.mean().item(), rel=1e-3)


def test_an_unchanged_model_does_not_diverge(text):
    model = tiny_model("llama")
    outcome = Divergence.of_dense(model, text, advance=silent).score(model, advance=silent)
    assert outcome.measures["kl_divergence"].value == pytest.approx(0, abs=1e-9)
    assert outcome.measures["top1_changed"].value == 0


def test_a_run_files_both_beside_the_perplexity(cli, tiny_run):
    result = json.loads(cli(*tiny_run, "-m", "wanda", "--divergence", "--json", "-q").stdout)
    scores = {score["metric"]: score for score in result["scores"]}
    assert scores.keys() == {"token_ppl", "kl_divergence", "top1_changed"}
    assert len({score["protocol"] for score in scores.values()}) == 1
    assert scores["kl_divergence"]["value"] > 0 == scores["kl_divergence"]["dense_value"]
    assert result["spec"]["divergence"] is True
