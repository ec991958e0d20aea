"""`prunebench sample` as a user meets it, and `run --log-text`."""

import gc
import json
import shutil
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from prunebench.checkpoints.model_card import model_card
from prunebench.cli import completions
from prunebench.results.completions import PROMPTS
from prunebench.results.report.data import build_report
from prunebench.results.report.page import render_page
from prunebench.results.schema import Result
from prunebench.results.store import ResultStore
from prunebench.run import sample as sampling
from prunebench.testing import tiny_model
from tests.report_pages import data_of

PRUNE = ("-m", "magnitude", "--dtype", "bfloat16")


def only_result(root, *, method="magnitude"):
    results, damaged = ResultStore(root / "results").read()
    assert not damaged
    return next(result for result in results if result.spec.method == method)


def generated(folder, prompt, count, dtype=torch.bfloat16):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    output = model.generate(
        ids, max_new_tokens=count, do_sample=False, pad_token_id=0,
        eos_token_id=[tokenizer.eos_token_id, model.config.eos_token_id],
    )  # fmt: skip
    return output[0, ids.shape[1] :].tolist()


@pytest.fixture
def typed(cli, monkeypatch):
    """Run a command whose words its result has: they name the model and the saved folder."""

    def run(*words):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["prunebench", *words])
            return cli(*words)

    return run


@pytest.mark.slow
def test_dense_and_pruned_side_by_side(cli, typed, tiny_run, tiny_folder, tmp_path, monkeypatch):
    for name, sparsity in (("half", "0.5"), ("two-four", "2:4")):
        typed(*tiny_run, *PRUNE, "--sparsity", sparsity, "--save-model", name)
    cli("export", "two-four", "-o", "packed", "--to", "packed24")
    alive, load = [], sampling.load_model

    def one_at_a_time(*args, **kwargs):
        gc.collect()
        assert not [model for model in alive if model() is not None]
        model = load(*args, **kwargs)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(sampling, "load_model", one_at_a_time)
    results = tmp_path / "results"
    ids = [r.id for r in ResultStore(results).read()[0] if r.spec.sparsity == "0.5"]
    outcome = cli(
        "sample", ids[0], "two-four", "packed", "-p", "the quick", "-p", "a lazy dog",
        "--max-new-tokens", "12", "--json", "--results-dir", results,
    )  # fmt: skip
    document = json.loads(outcome.stdout)
    assert len(alive) == 4 and document["complete"]
    names = [model["name"] for model in document["models"]]
    assert names == ["dense", "magnitude 0.5", "magnitude 2:4 (two-four)", "magnitude 2:4 (packed)"]
    assert {model["dense"] for model in document["models"]} == {"dense"}
    assert {model["dtype"] for model in document["models"]} == {"bfloat16"}
    assert [model["stored"] for model in document["models"]] == ["dense"] * 3 + ["packed24"]
    assert document["models"][1]["result"] == ids[0]
    folders = dict(zip(names, (tiny_folder, "half", "two-four", "two-four"), strict=True))
    for row in document["prompts"]:
        dense = row["completions"][0]["token_ids"]
        for completion in row["completions"]:
            tokens = completion["token_ids"]
            assert tokens == generated(folders[completion["model"]], row["prompt"], 12)
            pairs = [a == b for a, b in zip(tokens, dense, strict=False)]
            same = pairs.index(False) if False in pairs else len(pairs)
            assert completion["same_tokens"] == (None if completion["model"] == "dense" else same)
    # the packed folder holds the same model, whatever runs it
    for row in document["prompts"]:
        plain, packed = row["completions"][2:]
        assert plain["token_ids"] == packed["token_ids"]


def test_a_packed_folder_is_run_as_it_is_now(cli, typed, tiny_run, monkeypatch):
    typed(*tiny_run, *PRUNE, "--sparsity", "2:4", "--save-model", "ck")
    cli("export", "ck", "-o", "packed", "--to", "packed24")
    loaded, load = [], sampling.load_model
    monkeypatch.setattr(
        sampling, "load_model", lambda *a, **kw: loaded.append(load(*a, **kw)) or loaded[-1]
    )
    words = ("sample", "packed", "--no-dense", "-p", "the", "--max-new-tokens", "1")
    cli(*words)
    config = Path("packed/config.json")
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.25'))
    cli(*words)
    assert [model.config.rms_norm_eps for model in loaded] == [1e-6, 0.25]
    # the weights: what it writes would be shown as that of the run
    for folder, file in (("packed", "packed24.safetensors"), ("ck", "model.safetensors")):
        tensors = load_file(f"{folder}/{file}")
        tensors["model.norm.weight"] *= 3
        save_file(tensors, f"{folder}/{file}", metadata={"format": "pt"})
        output = cli("sample", folder, *words[2:], code=4).output
        assert f"the weights in {folder} are not those that were scored" in output
        Path(folder, "prunebench.json").unlink()
        cli("sample", folder, *words[2:])
    assert torch.equal(loaded[-1].model.norm.weight, tensors["model.norm.weight"])


def test_three_prompts_of_ours_without_dense(cli, tiny_folder):
    outcome = cli("sample", tiny_folder, "--no-dense", "--max-new-tokens", "2")
    for prompt in PROMPTS[:3]:
        assert prompt in outcome.stdout
    assert f"{tiny_folder}  2 tokens" in outcome.stdout
    assert "tokens/s" not in outcome.stdout  # too few steps to be measured
    assert "dense" not in outcome.stdout


def test_a_folder_without_a_result_has_the_dense_model_that_is_named(cli, tiny_folder):
    shutil.copytree(tiny_folder, "stranger")
    words = ("sample", "stranger", "-p", "the", "--max-new-tokens", "10")
    alone = cli(*words)
    assert "name it with --dense" in alone.output
    document = json.loads(cli(*words, "--dense", tiny_folder, "--json", "-q").stdout)
    dense, stranger = document["prompts"][0]["completions"]
    assert stranger["same_tokens"] == len(dense["token_ids"]) == 10
    assert all(model["tokens_per_second"] > 0 for model in document["models"])
    assert document["hardware"]["device"] == "cpu" and document["hardware"]["cpu"]


def test_prompts_come_from_options_and_files_and_the_chat_template_is_used(cli, tiny_folder):
    shutil.copytree(tiny_folder, "chat")
    Path("prompts.txt").write_text("second\n\nthird\n")
    words = ("sample", "chat", "--no-dense", "-p", "first", "--prompts", "prompts.txt", "--json")
    words = (*words, "--max-new-tokens", "1")
    assert "has no chat template" in cli(*words, "--chat", code=4).output
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}!"
    Path("chat/chat_template.jinja").write_text(template)
    document = json.loads(cli(*words, "--chat", "-q").stdout)
    assert [row["prompt"] for row in document["prompts"]] == ["first", "second", "third"]
    lengths = [row["completions"][0]["prompt_tokens"] for row in document["prompts"]]
    assert lengths == [len(f"<user>{word}!") for word in ("first", "second", "third")]


def test_each_model_has_its_own_tokenizer(cli, tiny_folder, gemma_folder):
    outcome = cli(
        "sample", tiny_folder, gemma_folder, "--no-dense", "-p", "the", "--json", "-q",
        "--max-new-tokens", "3",
    )  # fmt: skip
    first, second = json.loads(outcome.stdout)["prompts"][0]["completions"]
    assert (first["prompt_tokens"], second["prompt_tokens"]) == (3, 4)  # one has BOS


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ("nowhere/", 3, "there is no folder nowhere/"),
        ("0123abcd", 3, "there is no results folder"),
        ("empty", 4, "empty is not a checkpoint"),
        ("broken", 3, "no usable tokenizer"),
        ("ck -p ", 2, "--prompt is empty"),
        ("ck --prompts nothing.txt", 3, "cannot read nothing.txt"),
        ("ck --prompts blank.txt", 2, "blank.txt holds no prompt"),
        ("ck --no-dense --dense x", 2, "--dense does not go with --no-dense"),
        ("ck --dtype int8", 2, "--dtype 'int8'"),
        ("ck --device cuda:7", 3, "cuda:7 is not available"),
        ("ck ck --no-dense", 2, "ck is named twice"),
        ("ck --no-dense --max-new-tokens 0", 2, "max-new-tokens"),
    ],
)
def test_wrong_words(cli, tiny_folder, tmp_path, arguments, code, says):
    shutil.copytree(tiny_folder, "ck")
    shutil.copytree(tiny_folder, "broken")
    (tmp_path / "work" / "broken" / "tokenizer.json").write_text("{")
    (tmp_path / "work" / "empty").mkdir()
    (tmp_path / "work" / "blank.txt").write_text("\n \n")
    assert says in cli("sample", *arguments.split(" "), code=code).output


def test_a_prompt_beyond_the_context_names_both_numbers(cli, tiny_folder):
    limit = AutoModelForCausalLM.from_pretrained(tiny_folder).config.max_position_embeddings
    output = cli("sample", tiny_folder, "--no-dense", "-p", "x" * (limit + 9), code=2).output
    assert f"{limit + 9:,} tokens" in output and f"is {limit:,}" in output


def test_a_run_whose_weights_were_not_saved_or_whose_dense_model_is_gone(cli, tiny_run, tmp_path):
    results = ("--results-dir", tmp_path / "results")
    cli(*tiny_run, *PRUNE, "--sparsity", "0.5")
    output = cli("sample", only_result(tmp_path).id, *results, code=3).output
    assert "are not here" in output and "--save-model DIR" in output
    assert "no result is called" in cli("sample", "ffffffff", *results, code=2).output


def test_another_dense_model_than_the_run_pruned_is_refused(
    cli, typed, tiny_run, tiny_folder, tmp_path
):
    shutil.copytree(tiny_folder, "base")
    words = [str(tmp_path / "work" / "base") if w == str(tiny_folder) else w for w in tiny_run]
    typed(*words, *PRUNE, "--save-model", "out")
    arguments = ("sample", "out", "-p", "a", "--max-new-tokens", "2", "-q")
    assert "dense" in cli(*arguments).output
    torch.manual_seed(5)
    tiny_model("gpt2").save_pretrained("base")
    assert "is not the model that" in cli(*arguments, code=4).output
    shutil.rmtree("base")
    outcome = cli(*(word for word in arguments if word != "-q"))
    assert "name it with --dense" in outcome.output and "dense  2 tokens" not in outcome.stdout


def test_ctrl_c_prints_what_was_written(cli, tiny_folder, monkeypatch):
    shutil.copytree(tiny_folder, "second")
    complete, calls = sampling.complete, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return complete(*args, **kwargs)

    monkeypatch.setattr(sampling, "complete", interrupted)
    words = ("sample", tiny_folder, "second", "--no-dense", "-p", "one", "-p", "two")
    outcome = cli(*words, "--max-new-tokens", "4", code=130)
    assert outcome.stdout.count("4 tokens") == 2 and "interrupted" in outcome.output


# ---------------------------------------------------------------- layout

TEXTS = {
    "dense": " Paris.\n\nIt is known for its tower.",
    "wanda 2:4": " Paris.\n\nIt is known as the seat \x1b[31mof kings.",
    "sparsegpt 2:4": " Paris.\n\nIt is known for its tower.",
}


def document(names):
    return {
        "hardware": {"device": "cpu", "device_name": "A CPU", "cpu_threads": 2},
        "models": [
            {
                "name": name, "dense": "dense", "tokens_per_second": 9.0 + place,
                "backend": "dense", "dtype": "float32",
            }
            for place, name in enumerate(names)
        ],
        "prompts": [
            {
                "prompt": "The capital of France is",
                "completions": [
                    {
                        "model": name, "text": TEXTS[name], "finish_reason": "length",
                        "token_ids": list(range(11)), "same_tokens": 7,
                    }
                    for name in names
                ],
            }
        ],
    }  # fmt: skip


@pytest.mark.parametrize("width", [None, 80, 120])
def test_columns_on_a_wide_terminal_and_below_each_other_elsewhere(width, monkeypatch, capsys):
    monkeypatch.setattr(completions, "terminal_width", lambda: width)
    completions.print_completions(document(list(TEXTS)))
    output = capsys.readouterr().out
    lines = output.splitlines()
    assert max(map(len, lines)) <= (width or 200)
    assert "\x1b" not in output  # a text cannot write to the terminal
    titles = [line for line in lines if "dense  " in line or line.startswith("dense")]
    assert ("wanda 2:4" in titles[0] and "sparsegpt 2:4" in titles[0]) == (width == 120)
    assert "known \N{BLACK RIGHT-POINTING SMALL TRIANGLE}as" in output
    assert "the first 7 as dense" in output and "11 tokens, as dense" in output
    assert "tokens/s: dense 9.0, wanda 2:4 10.0, sparsegpt 2:4 11.0" in output
    assert "A CPU, 2 threads, float32" in output


# ---------------------------------------------------------------- run --log-text


@pytest.mark.slow
def test_a_run_keeps_completions_and_the_report_and_the_card_show_them(
    cli, tiny_run, tiny_folder, tmp_path
):
    plain = [*tiny_run, *PRUNE, "--sparsity", "2:4"]
    cli(*plain)
    without = only_result(tmp_path)
    assert without.completions is None and '"completions"' not in without.to_json()
    shutil.rmtree(tmp_path / "results")
    cli(*plain, "--log-text", "2", "--save-model", "out")
    result = only_result(tmp_path)
    # it changes no number: same specification, same weights, same scores
    assert result.spec_id == without.spec_id
    assert result.model.evaluated_sha256 == without.model.evaluated_sha256
    assert result.scores == without.scores
    assert Result.model_validate_json(result.to_json()) == result
    block = result.completions
    assert [row.prompt for row in block.completions] == list(PROMPTS[:2])
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    for row in block.completions:
        pruned, dense = (
            generated(folder, row.prompt, block.max_new_tokens) for folder in ("out", tiny_folder)
        )
        assert (row.tokens, row.dense_tokens) == (len(pruned), len(dense))
        assert row.text == tokenizer.decode(pruned, skip_special_tokens=True)
        assert row.dense_text == tokenizer.decode(dense, skip_special_tokens=True)
    assert "## Completions" in model_card(result, name="x")
    assert "## Completions" not in model_card(without, name="x")
    (model,) = data_of(render_page(build_report([result])))["models"]
    assert [shown["prompt"] for shown in model["texts"]] == list(PROMPTS[:2])
    (dense, pruned), row = model["texts"][0]["texts"], block.completions[0]
    assert dense == [None, "dense", row.dense_text, None]
    assert pruned[1] == "magnitude 2:4" and pruned[2] + (pruned[3] or "") == row.text
    assert data_of(render_page(build_report([without])))["models"][0]["texts"] == []


@pytest.mark.real
def test_a_real_model_beside_its_pruned_self(cli):
    cli(
        "run", "-m", "magnitude", "--sparsity", "0.3", "--ppl-tokens", "512", "--log-text", "1",
        "--save-model", "out", "-q",
    )  # fmt: skip
    (result,) = ResultStore(Path("results")).read()[0]
    (logged,) = result.completions.completions
    words = ("sample", "out", "-p", PROMPTS[0], "--max-new-tokens", "8", "--json", "-q")
    document = json.loads(cli(*words).stdout)
    dense, pruned = document["prompts"][0]["completions"]
    assert dense["text"].startswith(" Paris") and logged.dense_text.startswith(dense["text"])
    assert pruned["token_ids"] == generated("out", PROMPTS[0], 8, torch.float32)
    assert logged.text.startswith(pruned["text"])
    assert document["models"][0]["name"] == "dense"


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--log-text", "-1"), 2, "greater than or equal to 0"),
        (("--log-text", "999"), 2, f"use 0 to {len(PROMPTS)}"),
        (("--log-text", "1", "--weights", "disk"), 2, "write text, token by token"),
        (("--log-text", "1", "--once"), 2, "--once does not go with"),
    ],
)
def test_wrong_numbers_of_prompts(cli, tiny_run, words, code, says):
    assert says in cli(*tiny_run, *PRUNE, "--sparsity", "0.5", *words, code=code).output
