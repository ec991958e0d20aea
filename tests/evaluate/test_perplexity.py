"""Perplexity: the definition, the protocol's id, and a cache that follows the weights."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from prunebench.errors import IncompatibleData
from prunebench.evaluate.outcome import ScoredModel, cached_outcomes, remember_outcomes
from prunebench.evaluate.perplexity import prepare_perplexity, token_ppl, window_losses
from prunebench.models.load import load_model
from prunebench.progress import Silent
from prunebench.testing import tiny_model, tiny_tokens
from tests.model_folders import with_a_bias_of_routing


def prepare(name, tokenizer, *, seqlen=64, limit=None):
    return prepare_perplexity(
        name, tokenizer, seqlen=seqlen, limit_tokens=limit, vocabulary=256, progress=Silent()
    )


def by_definition(model, windows):
    """Mean of -log p(next) over all targets, one token at a time, in float64."""
    losses = []
    with torch.no_grad():
        for window in windows:
            logits = model(input_ids=window[None]).logits[0].double()
            for t in range(len(window) - 1):
                losses.append(-torch.log_softmax(logits[t], -1)[window[t + 1]].item())
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom"])
def test_equals_the_definition(architecture):
    model, windows = tiny_model(architecture), tiny_tokens(samples=5, seqlen=20)
    assert token_ppl(model, windows) == pytest.approx(by_definition(model, windows), rel=1e-5)


def test_the_batch_size_does_not_matter():
    model, windows = tiny_model("llama"), tiny_tokens(samples=5, seqlen=20)
    values = [token_ppl(model, windows, batch_tokens=n) for n in (1, 40, 1000)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)


def test_progress_counts_windows():
    done = []
    window_losses(tiny_model("llama"), tiny_tokens(samples=5), batch_tokens=48, advance=done.append)
    assert done == [2, 2, 1]


def test_a_broken_model_has_no_perplexity():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(IncompatibleData, match="not finite"):
        token_ppl(model, tiny_tokens())


def test_the_tail_is_dropped_and_the_id_says_what_was_done(byte_tokenizer, eval_file):
    task = prepare(f"file:{eval_file}", byte_tokenizer)
    size = len(eval_file.read_text())
    assert task.windows.shape == (size // 64, 64)
    assert task.protocol == f"{task.dataset}/all/64/v1"
    assert task.targets == size // 64 * 63
    ids = byte_tokenizer(eval_file.read_text()).input_ids
    assert task.windows.flatten().tolist() == ids[: size // 64 * 64]


def test_limited_rows_are_marked(byte_tokenizer, eval_file):
    task = prepare(f"file:{eval_file}", byte_tokenizer, limit=150)
    assert task.limited
    assert task.protocol.endswith("/64/v1/first-128")
    assert not prepare(f"file:{eval_file}", byte_tokenizer, limit=10**6).limited
    with pytest.raises(IncompatibleData, match="less than one window"):
        prepare(f"file:{eval_file}", byte_tokenizer, limit=10)


def test_documents_are_joined_by_a_blank_line(byte_tokenizer, monkeypatch):
    from prunebench.calibration.texts import Text
    from prunebench.evaluate import perplexity

    text = Text("two", "all", "o", ["first", "second"])
    monkeypatch.setattr(perplexity, "load_text", lambda *a, **k: text)
    task = prepare("two", byte_tokenizer, seqlen=13)
    assert bytes(byte_tokenizer.decode(task.windows[0]), "utf-8") == b"first\n\nsecond"


def test_too_short_a_text(byte_tokenizer, tmp_path):
    (tmp_path / "short.txt").write_text("ten chars!")
    with pytest.raises(IncompatibleData, match=r"10 tokens, one window of 64 is needed"):
        prepare(f"file:{tmp_path / 'short.txt'}", byte_tokenizer)


def test_the_score_has_a_standard_error_and_every_window(byte_tokenizer, eval_file):
    """exp(mean loss), and by the delta method its standard error over windows."""
    task = prepare(f"file:{eval_file}", byte_tokenizer)
    (outcome,) = task.score(tiny_model("llama"), advance=lambda done: None)
    losses = np.array([item.values["nll"] for item in outcome.items])
    measure = outcome.measures["token_ppl"]
    assert measure.value == pytest.approx(np.exp(losses.mean()), rel=1e-9)
    assert measure.value == token_ppl(tiny_model("llama"), task.windows)
    spread = losses.std(ddof=1) / np.sqrt(len(losses))
    assert measure.stderr == pytest.approx(measure.value * spread, rel=1e-9)
    assert len({item.sha256 for item in outcome.items}) == len(task.windows)


def test_the_cache_follows_weights_config_and_tokens(byte_tokenizer, eval_file):
    task = prepare(f"file:{eval_file}", byte_tokenizer)
    other = prepare(f"file:{eval_file}", byte_tokenizer, limit=128)
    model = tiny_model("llama")
    assert cached_outcomes(ScoredModel.of(model, "w1"), task) is None
    outcome = task.score(model, advance=lambda done: None)
    remember_outcomes(ScoredModel.of(model, "w1"), task, outcome)
    assert cached_outcomes(ScoredModel.of(model, "w1"), task) == outcome
    assert cached_outcomes(ScoredModel.of(model, "w2"), task) is None
    assert cached_outcomes(ScoredModel.of(model, "w1"), other) is None
    model.config.rope_parameters["rope_theta"] *= 2  # the same weights, another function
    assert cached_outcomes(ScoredModel.of(model, "w1"), task) is None


def test_the_cache_follows_the_buffers_that_a_checkpoint_stores(
    byte_tokenizer, eval_file, tmp_path
):
    """The bias of a router is no parameter, and decides which experts answer."""
    task = prepare(f"file:{eval_file}", byte_tokenizer)
    folder = with_a_bias_of_routing(tmp_path / "model", byte_tokenizer)
    model = load_model(folder, dtype=torch.float32, device=torch.device("cpu"))
    remember_outcomes(
        ScoredModel.of(model, "w1"), task, task.score(model, advance=lambda done: None)
    )
    assert cached_outcomes(ScoredModel.of(model, "w1"), task) is not None
    name = next(n for n, _ in model.named_buffers() if n.endswith("e_score_correction_bias"))
    model.get_buffer(name)[0] += 5
    assert cached_outcomes(ScoredModel.of(model, "w1"), task) is None


def test_two_texts_of_the_same_windows_are_two_scores(cli, tiny_run, eval_file, tmp_path):
    longer = tmp_path / "longer.txt"
    text = Path(eval_file).read_text("utf-8")
    both = ["--ppl", f"file:{longer}"]  # beside that of the fixture
    longer.write_text(text + "!", encoding="utf-8")  # less than a window more
    result = json.loads(cli(*tiny_run, "-m", "magnitude", *both, "--json", "-q").stdout)
    first, second = result["scores"]
    assert first["value"] == second["value"] and first["dense_value"] == second["dense_value"]
    assert first["protocol"] != second["protocol"]


@pytest.mark.parametrize("damage", ['{"val', "[1]", "[{}]", "{}", "[]x"])
def test_a_damaged_cache_entry_is_measured_again(byte_tokenizer, eval_file, damage):
    from prunebench.files import cache_dir

    task = prepare(f"file:{eval_file}", byte_tokenizer)
    model = tiny_model("llama")
    remember_outcomes(
        ScoredModel.of(model, "w1"), task, task.score(model, advance=lambda done: None)
    )
    for path in (cache_dir() / "baselines").iterdir():
        path.write_text(damage)
    assert cached_outcomes(ScoredModel.of(model, "w1"), task) is None
