"""`import prunebench`: what is refused, and in what state an error leaves the model."""

import pytest
import torch
from torch import nn

import prunebench
from prunebench.errors import IncompatibleData, MissingResource, OutOfMemory, UsageError
from prunebench.models.hashing import hash_weights
from prunebench.testing import tiny_model, tiny_tokens

SAMPLES = {"calibration_samples": 4, "seqlen": 32}


@pytest.fixture
def model():
    return tiny_model("llama")


def quantized(model):
    model.is_quantized = True
    return model


def with_adapters(model):
    model.peft_config = {"default": object()}
    return model


def hooked(model):
    from torch.nn.utils import prune

    prune.l1_unstructured(model.model.layers[0].mlp.up_proj, "weight", amount=0.5)
    return model


def mixed(model):
    model.model.layers[0].to(torch.bfloat16)
    return model


def on_two_devices(model):
    model.model.layers[2].to("meta")
    return model


def compiled(model):
    model.compile()
    return model


REFUSED = [
    (nn.DataParallel, "pass model.module"),
    (torch.compile, "pass the model that torch.compile was called with"),
    (compiled, "prune before compiling"),
    (lambda model: nn.Linear(2, 2), "it is no model of transformers"),
    (lambda model: None, "it is no model of transformers"),
    (lambda model: model.model, "it has no language-model head"),
    (on_two_devices, "they are not in memory"),
    (lambda model: model.to("meta"), "they are not in memory"),
    (with_adapters, r"model = model.merge_and_unload\(\)"),
    (quantized, "load the model unquantized"),
    (hooked, "up_proj.weight is computed from another parameter"),
    (lambda model: model.double(), "its matrices are float64"),
    (mixed, "its matrices are bfloat16 and float32"),
]


@pytest.mark.parametrize(("wrap", "words"), REFUSED)
def test_models_that_cannot_be_pruned_in_place_are_refused(wrap, words, model):
    with pytest.raises(IncompatibleData, match=words):
        prunebench.prune(wrap(model), method="magnitude")


def test_a_quantized_model_can_still_be_scored(model):
    plain = prunebench.perplexity(model, text=tiny_tokens()).value
    assert prunebench.perplexity(quantized(model), text=tiny_tokens()).value == plain
    with pytest.raises(IncompatibleData, match=r"pass model\.module"):
        prunebench.perplexity(nn.DataParallel(model), text=tiny_tokens())


def test_an_encoder_decoder_is_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=32, d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4)
    with pytest.raises(IncompatibleData, match="decoder-only"):
        prunebench.prune(T5ForConditionalGeneration(config), method="magnitude")


WRONG = [
    ({"method": "wandaa"}, UsageError, "did you mean 'wanda'"),
    ({"method": "wanda", "sampels": 3}, UsageError, "prune has no option 'sampels'"),
    ({"method": "wanda", "ppl": "wiki"}, UsageError, "prune has no option 'ppl'"),
    ({"method": "wanda", "sparsity": "2:5"}, IncompatibleData, "not divisible by 5"),
    ({"method": "wanda", "sparsity": 1.5}, UsageError, "1.5"),
    ({"method": "wanda", "within_block": "both"}, UsageError, "within-block"),
    ({"method": "wanda", "calibration_samples": 0}, UsageError, "calibration-samples 0"),
    ({"method": "wanda", "seqlen": 4096}, UsageError, "beyond the model's context of 128"),
    ({"method": "wanda", "method_options": {"alpha": 1}}, UsageError, "alpha"),
    ({"method": "wanda", "calibration": "c44"}, UsageError, "unknown text 'c44'"),
    ({"method": "wanda", "calibration": "file:no.txt"}, MissingResource, "no file 'no.txt'"),
    ({"method": "wanda", "calibration": "too short a text"}, IncompatibleData, "is too short"),
    ({"method": "wanda", "calibration": torch.ones(2, 8)}, IncompatibleData, "neither a text nor"),
    ({"method": "wanda", "calibration": torch.arange(8)}, IncompatibleData, "neither a text nor"),
    ({"method": "wanda", "calibration": [[1, 2], [3]]}, IncompatibleData, "neither a text nor"),
    ({"method": "wanda", "calibration": []}, IncompatibleData, "neither a text nor"),
    ({"method": "wanda", "calibration": object()}, IncompatibleData, "neither a text nor"),
    ({"method": "wanda", "calibration": tiny_tokens() + 250}, IncompatibleData, "vocabulary of"),
    ({"method": "wanda", "calibration": tiny_tokens(), "seqlen": 9}, UsageError, "leave seqlen"),
    ({"method": "maskllm", "sparsity": "0.5"}, UsageError, "is a ratio"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "words"), WRONG)
def test_a_wrong_option_is_refused_and_the_model_unchanged(options, error, words, held):
    before = hash_weights(held[0])
    with pytest.raises(error, match=words):
        sizes = {} if isinstance(options.get("calibration"), torch.Tensor) else SAMPLES
        prunebench.prune(*held, **{**sizes, **options})
    assert hash_weights(held[0]) == before


def test_a_text_needs_the_tokenizer(model):
    with pytest.raises(UsageError, match="there is no tokenizer"):
        prunebench.prune(model, method="wanda", calibration="some text " * 500, **SAMPLES)
    with pytest.raises(UsageError, match="there is no tokenizer"):
        prunebench.perplexity(model, text="some text " * 500)


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("wikki", UsageError, "unknown text"),
        ("short text", IncompatibleData, "is too short"),
        (torch.arange(20), IncompatibleData, "one window of 512 is needed"),
        (torch.ones(1, 2, 3, dtype=torch.int64), IncompatibleData, "3 axes"),
        (torch.full((1, 600), 3), UsageError, "beyond the model's context"),
        (tiny_tokens() + 250, IncompatibleData, "vocabulary of 256"),
        ([["a"]], IncompatibleData, "neither a text nor token ids"),
    ],
)
def test_a_text_that_cannot_be_scored(text, error, words, held):
    with pytest.raises(error, match=words):
        prunebench.perplexity(*held, text)


# ---------------------------------------------------------------- errors on the way


@pytest.mark.parametrize("error", [MemoryError("no"), KeyboardInterrupt(), RuntimeError("broken")])
@pytest.mark.parametrize(
    ("stop", "state"), [(1, "the model is unchanged"), (5, "partly pruned: load it again")]
)
def test_an_error_says_in_what_state_the_model_is(error, stop, state, model, monkeypatch):
    from prunebench.pruners.wanda import Wanda

    plain, count = Wanda.prune_weight, []

    def failing(self, weight, stats, sparsity):
        count.append(1)
        if len(count) == stop:
            raise error
        return plain(self, weight, stats, sparsity)

    monkeypatch.setattr(Wanda, "prune_weight", failing)
    with pytest.raises(BaseException) as caught:
        prunebench.prune(model, method="wanda", calibration=tiny_tokens())
    said = [str(caught.value), *getattr(caught.value, "__notes__", [])]
    assert state in "\n".join(said)
    assert isinstance(caught.value, OutOfMemory if isinstance(error, MemoryError) else type(error))
    assert not any(module._forward_hooks for module in model.modules())


def test_weights_that_are_not_finite_are_named(model):
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(IncompatibleData, match="NaN") as caught:
        prunebench.prune(model, method="magnitude")
    assert "partly pruned: load it again" in caught.value.fix
