"""Runs with an allocation: realised as asked, saved in the result, wrong ones refused."""

import json

import pytest
import torch

from prunebench.allocators import BUILTIN

# ------------------------------------------------------------ from the command line


def test_a_run_with_an_allocation(cli, tiny_run, tmp_path):
    saved = tmp_path / "ratios.json"
    made = cli(
        *tiny_run, "-m", "magnitude", "--sparsity", "0.7", "--allocation", "owl",
        "--set", "allocation.strength=0.1", "--save-allocation", saved, "--json",
    )  # fmt: skip
    result = json.loads(made.stdout)
    assert result["spec"]["allocation"] == "owl"
    assert result["spec"]["allocation_options"] == {"strength": 0.1, "outlier": 5.0}
    assert result["spec"]["within_block"] is None
    assert result["calibration"] is not None
    assert result["allocation"]["paper"] == "2310.05175"
    asked = [float(layer["requested"]) for layer in result["sparsity"]["layers"]]
    assert max(asked) - min(asked) == pytest.approx(0.2)
    assert all(layer["estimate"] is not None for layer in result["sparsity"]["layers"])
    again = json.loads(
        cli(
            *tiny_run, "-m", "magnitude", "--sparsity", "0.7", "--allocation", f"file:{saved}",
            "--json",
        ).stdout
    )  # fmt: skip
    assert again["model"]["evaluated_sha256"] == result["model"]["evaluated_sha256"]
    assert again["spec"]["allocation"] == "file"
    assert "/" not in json.dumps(again["spec"]["allocation_options"])
    table = cli("compare", "--results-dir", tmp_path / "results").stdout
    assert "owl" in table and "file" in table


@pytest.fixture(scope="module")
def widths_folder(tmp_path_factory, byte_tokenizer):
    """Blocks of different and odd widths, as Gemma 3n and width pruning make them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from prunebench.models.load import quiet_transformers

    config = AutoConfig.for_model(
        "gemma3n_text", vocab_size=256, hidden_size=30, intermediate_size=[45, 128, 31],
        num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=1, head_dim=10,
        max_position_embeddings=128, pad_token_id=0, vocab_size_per_layer_input=256,
        hidden_size_per_layer_input=15, laurel_rank=7, altup_num_inputs=2, sliding_window=16,
        num_kv_shared_layers=0, activation_sparsity_pattern=[0.0] * 3,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "widths"
    with quiet_transformers():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():  # norms and gates begin at zero
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("method", "allocation"),
    [*(("wanda", name) for name in BUILTIN), ("sparsegpt", "owl"), ("magnitude", "uniform")],
)
def test_realised_is_what_was_asked_at_any_width(cli, tiny_run, widths_folder, method, allocation):
    """To 0.01% of all weights, however small the layers and whatever rounds in which."""
    options = {"hessian": ["--set", "allocation.range=auto"]}.get(allocation, [])
    result = json.loads(
        cli(
            *tiny_run, "--model", widths_folder, "-m", method, "--sparsity", "0.613",
            "--allocation", allocation, *options, "--json",
        ).stdout
    )  # fmt: skip
    assert result["sparsity"]["realised_ratio"] == pytest.approx(0.613, abs=1e-4)


def test_the_loss_of_every_layer_is_in_the_result(cli, tiny_run):
    result = json.loads(cli(*tiny_run, "-m", "sparsegpt", "--json").stdout)
    assert all(layer["loss"] > 0 for layer in result["sparsity"]["layers"])
    assert all(layer["estimate"] is None for layer in result["sparsity"]["layers"])
    assert result["allocation"] is None


def test_the_scheduler_is_sparsegpt_with_the_hessian_allocator(cli, tiny_run):
    spec = ["--sparsity", "0.7", "--json"]
    row = json.loads(cli(*tiny_run, "-m", "scheduler", *spec).stdout)
    same = json.loads(cli(*tiny_run, "-m", "sparsegpt", "--allocation", "hessian", *spec).stdout)
    assert row["model"]["evaluated_sha256"] == same["model"]["evaluated_sha256"]
    assert row["allocation"]["name"] == "hessian"
    assert row["method"]["name"] == "scheduler"
    assert all(x["loss"] and x["estimate"] for x in row["sparsity"]["layers"])


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--allocation", "owel"], 2, "did you mean 'owl'?"),
        (["--allocation", "owl", "--sparsity", "2:4"], 2, "does not go with wanda 2:4"),
        (["--allocation", "hessian", "--sparsity", "0.5"], 2, "cannot reach the mean 0.5"),
        (["--allocation", "hessian", "--sparsity", "0.5", "--dry-run"], 2, "range=auto"),
        (["--allocation", "file:none.json"], 2, "cannot read the allocation"),
        (["--allocation", "owl", "--set", "allocation.strenght=1"], 2, "did you mean 'strength'?"),
        (["--allocation", "owl", "--set", "allocation.strength=x"], 2, "should be float"),
        (["--set", "allocation.low=0.1"], 2, "uniform has no option 'low'"),
    ],
)
def test_wrong_allocations_name_the_way_out(cli, tiny_run, options, code, says):
    outcome = cli(*tiny_run, "-m", "wanda", *options, code=code)
    assert says in outcome.stderr


def test_a_recipe_may_hold_allocator_options(cli, tiny_run, tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        'method = "wanda"\nsparsity = 0.7\nallocation = "owl"\n[set.allocation]\nstrength = 0.1\n'
    )
    result = json.loads(cli(*tiny_run, "--recipe", recipe, "--json").stdout)
    assert result["spec"]["allocation_options"]["strength"] == 0.1


def test_the_list(cli):
    rows = json.loads(cli("list", "allocators", "--json").stdout)
    assert [row["name"] for row in rows] == list(BUILTIN)
