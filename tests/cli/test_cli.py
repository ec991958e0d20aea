"""The command line as a user meets it: what it prints, what it keeps, what it leaves alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.main import get_command

from prunebench.cli import app
from prunebench.models.masks import mask_file
from prunebench.results.store import ResultStore


def results_of(tmp_path):
    results, damaged = ResultStore(tmp_path / "results").read()
    assert damaged == []
    return results


def commands():
    commands = {}
    for name, command in get_command(app).commands.items():
        for sub, inner in getattr(command.command, "commands", {"": command.command}).items():
            commands[f"{name} {sub}".strip()] = inner
    return commands


@pytest.mark.parametrize("name", list(commands()))
def test_every_command_and_option_has_help(name):
    command = commands()[name]
    assert command.help
    for option in command.params:
        assert getattr(option, "help", None), f"{name} {option.name}"


def test_the_options_of_run_are_a_decision():
    names = {o for p in commands()["run"].params for o in p.opts if o.startswith("--")}
    assert names == {
        "--method", "--model", "--sparsity", "--allocation", "--recover", "--save-allocation",
        "--calibration",
        "--calibration-samples", "--seqlen", "--execute", "--backend", "--once",
        "--weights", "--activations", "--resume-info", "--calibration-bos",
        "--ppl", "--ppl-seqlen", "--ppl-tokens", "--ppl-bos", "--divergence", "--tasks",
        "--num-fewshot", "--log-text",
        "--limit", "--apply-chat-template", "--batch-size", "--include-path", "--log-samples",
        "--seed", "--dtype", "--device", "--set",
        "--save-model", "--save-masks", "--save-calibration", "--within-block", "--results-dir",
        "--recipe", "--dry-run", "--show-config", "--force", "--json", "--quiet", "--debug",
    }  # fmt: skip


def test_a_run_tells_and_files_its_result(cli, tiny_run, tmp_path):
    outcome = cli(*tiny_run, "--method", "wanda", "--sparsity", "2:4", "--seed", "3")
    assert "wanda 2:4 on tiny-llama" in outcome.stdout
    assert "50.00% of" in outcome.stdout
    (result,) = results_of(tmp_path)
    assert str(ResultStore(tmp_path / "results").path_of(result)) in outcome.stdout
    assert result.spec.sparsity == "2:4"
    assert result.spec.calibration_samples == 4
    assert result.calibration.seed == 3
    assert result.model.revision.startswith("sha256:")
    assert result.model.dense_sha256 != result.model.evaluated_sha256
    assert result.sparsity.realised_ratio == pytest.approx(0.5, abs=1e-3)
    assert {layer.name for layer in result.sparsity.layers} >= {"model.layers.2.mlp.down_proj"}
    (score,) = result.scores
    assert score.value != score.dense_value
    assert result.cost.peak_rss_bytes > 1e8
    assert result.cost.peak_gpu_bytes is None
    for stage in ("start", "prune", "baseline", "score"):
        assert f"{stage} " in outcome.stderr


def test_the_score_is_that_of_the_saved_model(cli, tiny_run, tmp_path, eval_file):
    """Plain transformers loads the folder; its perplexity, computed here, is the one in the row."""
    import math

    from transformers import AutoModelForCausalLM, AutoTokenizer

    cli(*tiny_run, "-m", "wanda", "--sparsity", "0.5", "--save-model", "out")
    (result,) = results_of(tmp_path)
    model = AutoModelForCausalLM.from_pretrained("out", dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained("out")(eval_file.read_text(), return_tensors="pt").input_ids
    windows = ids[0][: ids.numel() // 64 * 64].view(-1, 64)
    with torch.no_grad():
        logits = model(windows).logits[:, :-1].double()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert result.scores[0].value == pytest.approx(math.exp(loss), rel=1e-5)
    assert result.scores[0].dense_value != pytest.approx(math.exp(loss), rel=1e-5)
    card = Path("out/README.md").read_text()
    assert "wanda at 0.5" in card
    assert f"{result.scores[0].value:.3f}" in card
    assert json.loads(Path("out/prunebench.json").read_text())["id"] == result.id


def test_a_model_in_bfloat16(cli, tiny_run, tmp_path):
    cli(*tiny_run, "-m", "wanda", "--dtype", "bfloat16", "--save-model", "out")
    (result,) = results_of(tmp_path)
    assert result.model.dtype == "bfloat16"
    assert "bfloat16" in Path("out/config.json").read_text()


def test_the_dense_baseline_is_measured_once(cli, tiny_run):
    assert "baseline" in cli(*tiny_run, "-m", "magnitude").stderr
    assert "baseline" not in cli(*tiny_run, "-m", "wanda").stderr
    assert "baseline" not in cli(*tiny_run, "-m", "dense").stderr


def test_a_cached_dense_score_is_never_the_pruned_model_s(cli, tiny_run, tmp_path):
    for sparsity in ("0.3", "0.6", "0.9"):
        cli(*tiny_run, "-m", "magnitude", "--sparsity", sparsity)
    results = results_of(tmp_path)
    assert len({r.scores[0].dense_value for r in results}) == 1
    assert len({r.scores[0].value for r in results}) == 3
    assert len({r.model.evaluated_sha256 for r in results}) == 3


def test_data_free_methods_do_not_split_by_calibration(cli, tiny_run, tmp_path):
    cli(*tiny_run, "-m", "magnitude", "--seed", "1")
    cli(*tiny_run, "-m", "magnitude", "--seed", "2", "--calibration-samples", "3")
    first, second = results_of(tmp_path)
    assert first.spec_id == second.spec_id
    assert first.calibration is None
    assert first.spec.within_block is None


def test_sequential_is_another_cell(cli, tiny_run, tmp_path):
    cli(*tiny_run, "-m", "wanda")
    cli(*tiny_run, "-m", "wanda", "--within-block", "sequential")
    assert {r.spec.within_block for r in results_of(tmp_path)} == {"joint", "sequential"}
    assert "wanda sequential" in cli("compare", "--results-dir", tmp_path / "results").stdout


def test_masks_are_packed_bits_of_what_was_kept(cli, tiny_run, tmp_path):
    cli(
        *tiny_run,
        "-m",
        "wanda",
        "--sparsity",
        "2:4",
        "--save-masks",
        "m.npz",
        "--save-model",
        "out",
    )
    from safetensors.torch import load_file

    weights = load_file("out/model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    with np.load("m.npz") as stored:
        assert len(stored.files) == 21
        bits = np.unpackbits(stored[f"{name}.mask"])[: weights[name].numel()]
    assert (bits.reshape(weights[name].shape).astype(bool) == (weights[name] != 0).numpy()).all()
    read = mask_file(Path("m.npz"), {name: tuple(weights[name].shape)})
    assert (read(name) == (weights[name] != 0)).all()


def test_masks_of_another_model_or_with_pickles_are_refused(tmp_path):
    from prunebench.errors import IncompatibleData

    np.savez(tmp_path / "m.npz", **{"a.mask": np.packbits(np.ones(8, bool))})
    for shapes in ({"a": (3, 4)}, {"b": (8,)}):
        with pytest.raises(IncompatibleData, match="does not fit the model"):
            mask_file(tmp_path / "m.npz", shapes)
    np.savez(tmp_path / "p.npz", **{"a.mask": np.array([{}], dtype=object)})
    with pytest.raises(IncompatibleData, match="is damaged"):
        mask_file(tmp_path / "p.npz", {"a": (8,)})


def test_saved_calibration_gives_the_same_mask(cli, tiny_run, tmp_path):
    cli(*tiny_run, "-m", "wanda", "--save-calibration", "c.safetensors")
    again = [
        a if not a.startswith("file:") or "calib" not in a else "tokens:c.safetensors"
        for a in tiny_run
    ]
    cli(*again, "-m", "wanda")
    first, second = results_of(tmp_path)
    assert first.model.evaluated_sha256 == second.model.evaluated_sha256
    assert first.calibration.tokens_sha256 == second.calibration.tokens_sha256
    assert {first.calibration.text, second.calibration.text} >= {"tokens"}


def test_token_files_for_perplexity(cli, tiny_run, tmp_path):
    from prunebench.calibration.windows import Windows, save_windows
    from prunebench.testing import tiny_tokens

    save_windows(tmp_path / "work" / "e.safetensors", Windows(tiny_tokens(), packed=False))
    cli(*tiny_run, "-m", "magnitude", "--ppl", "tokens:e.safetensors")
    (result,) = results_of(tmp_path)
    assert {s.protocol.split("/")[2] for s in result.scores} == {"64", "24"} or len(
        result.scores
    ) == 1


@pytest.mark.parametrize("option", ["--ppl", "--calibration"])
@pytest.mark.parametrize(("length", "code", "words"), [
    (1, 4, "windows of 1 token"), (129, 2, "beyond the model's context of 128 tokens"),
])  # fmt: skip
def test_token_files_of_other_lengths_than_a_model_reads_are_refused(
    cli, tiny_run, tmp_path, option, length, code, words
):
    from prunebench.calibration.windows import Windows, save_windows
    from prunebench.testing import tiny_tokens

    tokens = tiny_tokens(samples=4, seqlen=length)
    save_windows(tmp_path / "work" / "t.safetensors", Windows(tokens, packed=False))
    output = cli(*tiny_run, "-m", "wanda", option, "tokens:t.safetensors", code=code).output
    assert words in output and "\nload" not in output


@pytest.mark.parametrize(("words", "said"), [
    (["-m", "magnitude", "--save-calibration", "c"], "--save-calibration goes with --calibration"),
    (["-m", "wanda", "--once", "--log-samples"], "--once does not go with --log-samples"),
    (["-m", "wanda", "--sparsity", "2:4", "--dtype", "bfloat16", "--execute", "sparse24",
      "--weights", "disk"], "--weights disk does not go with wanda here"),
])  # fmt: skip
def test_what_would_be_ignored_is_refused_before_the_work(cli, tiny_run, words, said):
    output = cli(*tiny_run, *words, code=2).output
    assert said in output and "\nload" not in output


def test_a_divergence_needs_a_text(cli, tiny_run):
    place = tiny_run.index("--ppl")
    words = [*tiny_run[:place], "--ppl", "", *tiny_run[place + 2 :]]
    output = cli(*words, "-m", "wanda", "--divergence", code=2).output
    assert "--divergence goes with --ppl" in output


def test_json_is_the_result_and_nothing_else(cli, tiny_run, tmp_path):
    outcome = cli(*tiny_run, "-m", "magnitude", "--json", "--quiet")
    (result,) = results_of(tmp_path)
    assert outcome.stdout == result.to_json()
    assert outcome.stderr == ""


def test_repeating_a_run_adds_a_file(cli, tiny_run, tmp_path):
    cli(*tiny_run, "-m", "wanda")
    cli(*tiny_run, "-m", "wanda")
    first, second = results_of(tmp_path)
    assert first.spec_id == second.spec_id
    assert first.model.evaluated_sha256 == second.model.evaluated_sha256
    assert first.scores == second.scores


def test_dry_run_loads_and_writes_nothing(cli, tiny_run, tmp_path):
    outcome = cli(*tiny_run, "-m", "wanda", "--sparsity", "2:4", "--dry-run")
    assert "21 linears with" in outcome.stdout
    assert "nothing was loaded, nothing was written" in outcome.stdout
    assert not list((tmp_path / "results").rglob("*.json"))
    spec = json.loads(cli(*tiny_run, "-m", "wanda", "--dry-run", "--json").stdout)
    assert spec["model"] == "tiny-llama"
    assert spec["calibration_origin"].startswith("sha256:")


def test_dry_run_never_downloads(cli):
    outcome = cli("run", "-m", "wanda", "-M", "llama2-70b", "--dry-run", code=2)
    assert "prunebench models fetch llama2-70b" in outcome.output


def test_show_config_says_where_each_value_comes_from(cli, tmp_path, monkeypatch):
    recipe = tmp_path / "work" / "r.toml"
    recipe.write_text('method = "wanda"\nseqlen = 64\nseed = 5\nppl = ["wiki", "c4"]\n')
    monkeypatch.setenv("PRUNEBENCH_SEED", "6")
    monkeypatch.setenv("PRUNEBENCH_CALIBRATION_SAMPLES", "7")
    arguments = ["run", "--recipe", recipe, "--calibration-samples", "8", "--show-config"]
    rows = json.loads(cli(*arguments, "--json").stdout)
    assert rows["method"] == {"value": "wanda", "source": f"recipe {recipe}"}
    assert rows["seqlen"] == {"value": 64, "source": f"recipe {recipe}"}
    assert rows["seed"] == {"value": 6, "source": "environment"}
    assert rows["calibration_samples"] == {"value": 8, "source": "flag"}
    assert rows["ppl"]["value"] == ["wiki", "c4"]
    assert rows["dtype"] == {"value": "float32", "source": "default"}
    assert "environment" in cli(*arguments).stdout


def test_a_recipe_runs(cli, tiny_run, tmp_path):
    (tmp_path / "work" / "r.toml").write_text(
        'method = "random"\nsparsity = 0.25\n[set]\nseed = 9\n'
    )
    cli(*tiny_run, "--recipe", "r.toml")
    (result,) = results_of(tmp_path)
    assert (result.spec.method, result.spec.sparsity) == ("random", "0.25")
    assert result.method.options == {"seed": 9}


def test_compare_formats(cli, tiny_run, tmp_path):
    cli(*tiny_run, "-m", "magnitude")
    folder = ["--results-dir", tmp_path / "results"]
    assert "magnitude" in cli("compare", *folder).stdout
    assert cli("compare", *folder, "--format", "md").stdout.startswith("## tiny-llama")
    assert cli("compare", *folder, "--format", "csv").stdout.startswith("model,method,sparsity")
    assert json.loads(cli("compare", *folder, "--json").stdout)[0]["model"] == "tiny-llama"
    assert "did you mean 'json'" in cli("compare", *folder, "-f", "jsn", code=2).output
    assert "no result has method=x" in cli("compare", *folder, "method=x", code=3).output


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize(
    "command",
    [["compare"], ["compare", "--json"], ["compare", "--published"], ["compare", "--paired", "a"],
     ["compare", "method=wanda"], ["report"], ["report", "--figures", "f"]],
    ids=" ".join,
)  # fmt: skip
def test_where_there_are_no_results_that_is_all_that_is_said(cli, tmp_path, command, exists):
    if exists:
        (tmp_path / "work" / "mine").mkdir()
    outcome = cli(*command, "--results-dir", "mine", code=3)
    assert outcome.stderr == "no results yet in mine/; run prunebench run\n"
    assert outcome.stdout == ""
    assert not (tmp_path / "work" / "report.html").exists()


def test_compare_skips_damaged_files_and_says_so(cli, tiny_run, tmp_path):
    cli(*tiny_run, "-m", "magnitude")
    (tmp_path / "results" / "broken.json").write_text("{")
    outcome = cli("compare", "--results-dir", tmp_path / "results", code=4)
    assert "magnitude" in outcome.stdout
    assert "broken.json is skipped" in outcome.stderr


def test_results_commands(cli, tiny_run, tmp_path):
    cli(*tiny_run, "-m", "magnitude")
    folder = ["--results-dir", tmp_path / "results"]
    assert "1 results are sound" in cli("results", "check", *folder).stdout
    path = Path(cli("results", "table", *folder).stdout.strip())
    first = path.read_bytes()
    cli("results", "table", *folder)
    assert path.read_bytes() == first
    assert json.loads(cli("results", "schema").stdout)["title"] == "Result"
    (tmp_path / "results" / "broken.json").write_text("{")
    assert "1 of 2 files are damaged" in cli("results", "check", *folder, code=6).output


def test_lists(cli):
    for kind in ("methods", "models", "texts"):
        assert json.loads(cli("list", kind, "--json").stdout)
        assert cli("list", kind).stdout
    assert "did you mean 'methods'" in cli("list", "method", code=2).output
    assert "llama2-7b" in cli("models", "list").stdout


def test_models_path_and_fetch(cli, tiny_folder):
    assert "models fetch smollm2" in cli("models", "path", "smollm2-135m-q4", code=3).output
    assert cli("models", "path", tiny_folder).stdout.strip() == str(tiny_folder)
    assert cli("models", "fetch", tiny_folder, "-q").stdout.strip() == str(tiny_folder)


def test_doctor(cli, tmp_path):
    outcome = cli("doctor")
    for name in ("torch", "cpu", "cache", "results", "hugging face hub", "default model"):
        assert name in outcome.stdout
    (tmp_path / "work" / "results").write_text("a file")
    assert "a file stands where a folder should be" in cli("doctor", code=6).output
    assert json.loads(cli("doctor", "--json", "--results-dir", tmp_path).stdout)


def test_version(cli):
    from prunebench import __version__

    assert cli("--version").stdout.strip() == f"prunebench {__version__}"
