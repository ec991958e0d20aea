"""BOS: once a text by default, before every window if asked for, and never mixed."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from prunebench.calibration.bos import check_bos, needs_window
from prunebench.calibration.texts import Text
from prunebench.calibration.training import training_windows
from prunebench.calibration.windows import pack_windows, sample_windows
from prunebench.checkpoints.recipe_text import recipe_text
from prunebench.errors import IncompatibleData, UsageError
from prunebench.evaluate.perplexity import prepare_perplexity, token_ppl
from prunebench.models.source import catalog
from prunebench.progress import Silent
from prunebench.results.compare import compare
from prunebench.results.published import PublishedValue
from prunebench.results.store import ResultStore
from prunebench.run_options import spec_of, with_defaults
from prunebench.spec import RunSpec
from prunebench.sweep.recipe import read_recipe
from prunebench.testing import tiny_model
from tests.conftest import BOS, prose

WINDOW = ("--ppl-bos", "window", "--calibration-bos", "window")


@pytest.fixture
def gemma_run(tiny_run, gemma_folder):
    return [gemma_folder if word == tiny_run[2] else word for word in tiny_run]


def text_of(*lengths):
    return Text("t", "all", "o", [prose(n, seed=n)[:n] for n in lengths])


def windows_of(name, tokenizer, *, seqlen=64, limit=None, bos="window"):
    return prepare_perplexity(
        name, tokenizer, seqlen=seqlen, limit_tokens=limit, vocabulary=256, progress=Silent(),
        bos=bos,
    )  # fmt: skip


def test_every_perplexity_window_is_bos_and_the_next_piece_of_the_text(bos_tokenizer, eval_file):
    task = windows_of(f"file:{eval_file}", bos_tokenizer)
    assert task.windows.shape[1] == 64 and set(task.windows[:, 0].tolist()) == {BOS}
    plain = bos_tokenizer(eval_file.read_text(), add_special_tokens=False).input_ids
    pieces = task.windows[:, 1:].flatten().tolist()
    assert pieces == plain[: len(pieces)] and len(plain) - len(pieces) < 63
    assert task.targets == len(pieces)
    assert task.protocol == f"{task.dataset}/all/64/bos-window/v1"
    limited = windows_of(f"file:{eval_file}", bos_tokenizer, limit=150)
    assert limited.protocol == f"{task.dataset}/all/64/bos-window/v1/first-128"


def test_perplexity_with_bos_in_each_window_by_its_definition(bos_tokenizer, eval_file):
    """exp of the mean of -log p(next) over all text tokens, each window begun anew by BOS."""
    model = tiny_model("llama")
    plain = bos_tokenizer(eval_file.read_text(), add_special_tokens=False).input_ids
    losses = []
    with torch.no_grad():
        for start in range(0, len(plain) - 31, 31):
            ids = torch.tensor([[BOS, *plain[start : start + 31]]])
            rows = model(input_ids=ids).logits[0].double().log_softmax(-1)
            losses += [-rows[t, ids[0, t + 1]].item() for t in range(31)]
    task = windows_of(f"file:{eval_file}", bos_tokenizer, seqlen=32)
    expected = math.exp(sum(losses) / len(losses))
    assert token_ppl(model, task.windows) == pytest.approx(expected, rel=1e-5)


def test_by_default_bos_is_where_the_tokenizer_puts_it(bos_tokenizer, eval_file):
    task = windows_of(f"file:{eval_file}", bos_tokenizer, bos="text")
    ids = bos_tokenizer(eval_file.read_text()).input_ids
    assert task.windows.flatten().tolist() == ids[: task.windows.numel()]
    assert (task.windows == BOS).nonzero().tolist() == [[0, 0]]
    assert task.protocol == f"{task.dataset}/all/64/v1"


@pytest.mark.parametrize("lengths", [(200, 300, 90), (33,) * 40, (20,) * 60])
def test_every_calibration_window_begins_with_bos_sampled_or_packed(bos_tokenizer, lengths):
    text = text_of(*lengths)
    got = sample_windows(text, bos_tokenizer, samples=5, seqlen=32, seed=1, bos="window")
    assert got.packed == (lengths[0] < 32)
    assert got.token_ids.shape == (5, 32)
    assert set(got.token_ids[:, 0].tolist()) == {BOS} and not (got.token_ids[:, 1:] == BOS).any()
    for row in got.token_ids[:, 1:]:
        assert got.packed or any(
            bos_tokenizer.decode(row) in document for document in text.documents
        )
    plain = sample_windows(text, bos_tokenizer, samples=5, seqlen=32, seed=1)
    assert plain.sha256 == sample_windows(
        text, bos_tokenizer, samples=5, seqlen=32, seed=1, bos="text"
    ).sha256  # fmt: skip
    assert plain.sha256 != got.sha256


def test_windows_to_train_on_begin_with_bos_too(bos_tokenizer):
    sizes = {"samples": 6, "seqlen": 32, "held_out": 2, "least": 1, "seed": 0, "vocabulary": 256}
    got = training_windows(text_of(500), bos_tokenizer, **sizes, bos="window")
    rows = torch.cat([got.held_out, got.train])
    assert set(rows[:, 0].tolist()) == {BOS} and rows.shape == (8, 32)
    packed = pack_windows(text_of(500), bos_tokenizer, samples=8, seqlen=32, seed=0)
    assert (packed.token_ids == BOS).sum() == 1


def test_a_training_of_maskllm_reads_windows_that_begin_with_bos(cli, gemma_run, tmp_path):
    words = {"train": "true", "steps": 1, "batch": 2, "train_seqlen": 24, "held_out": 2,
             "prior": "magnitude"}  # fmt: skip
    run = [
        *gemma_run,
        "-m",
        "maskllm",
        *(w for k, v in words.items() for w in ("--set", f"{k}={v}")),
    ]
    said = cli(*run).stderr
    assert "add --ppl-bos window --calibration-bos window" in said
    cli(*run, "--calibration-bos", "window")
    results, _ = ResultStore(tmp_path / "results").read()
    assert [r.calibration for r in results] == [None, None]
    assert {r.spec.calibration_bos for r in results} == {"text", "window"}
    assert len({r.training.tokens_sha256 for r in results}) == 2
    (table,) = compare(results)
    assert table.settings == ("method_options", "calibration_bos")  # not one row


def test_a_token_file_has_bos_in_each_window_or_is_refused(bos_tokenizer, tmp_path):
    path = tmp_path / "t.safetensors"
    rows = torch.randint(3, 250, (6, 32))
    save_file({"token_ids": rows}, path)
    sizes = {"samples": 4, "seqlen": 32, "held_out": 2, "least": 1, "seed": 0, "vocabulary": 256}
    with pytest.raises(IncompatibleData, match="6 of 6 windows do not begin with BOS"):
        windows_of(f"tokens:{path}", bos_tokenizer)
    with pytest.raises(IncompatibleData, match="6 of 6 windows do not begin with BOS"):
        training_windows(path, bos_tokenizer, **sizes, bos="window")
    assert windows_of(f"tokens:{path}", bos_tokenizer, bos="text").protocol.endswith("/all/32/v1")
    rows[:, 0] = BOS
    save_file({"token_ids": rows}, path)
    with_bos = windows_of(f"tokens:{path}", bos_tokenizer)
    assert torch.equal(with_bos.windows, rows) and "/32/bos-window/v1" in with_bos.protocol


def test_a_run_files_where_bos_was(cli, gemma_run, tmp_path):
    cli(*gemma_run, "-m", "wanda", *WINDOW, "--save-calibration", "c.safetensors")
    cli(*gemma_run, "-m", "wanda")
    results, damaged = ResultStore(tmp_path / "results").read()
    assert damaged == []
    with_bos, plain = sorted(results, key=lambda r: r.spec.ppl_bos, reverse=True)
    assert (with_bos.spec.ppl_bos, with_bos.spec.calibration_bos) == ("window", "window")
    assert (
        with_bos.calibration.bos == "window" and "/64/bos-window/v1" in with_bos.scores[0].protocol
    )
    assert set(load_file("c.safetensors")["token_ids"][:, 0].tolist()) == {BOS}
    assert (plain.spec.ppl_bos, plain.calibration.bos) == ("text", "text")
    assert "bos" not in json.loads(plain.to_json())["calibration"]
    (table,) = compare(results)
    assert len(table.columns) == 2 and table.ranked_by is None  # never in one column
    assert "calibration_bos" in table.settings
    cells = {cell.settings["calibration_bos"]: cell for cell in table.cells[1:]}
    assert all(len(cell.scores) == 1 for cell in cells.values())


def test_one_calibration_scored_both_ways_is_one_row_with_two_columns(cli, gemma_run, tmp_path):
    cli(*gemma_run, "-m", "magnitude")
    cli(*gemma_run, "-m", "magnitude", *WINDOW)
    results, _ = ResultStore(tmp_path / "results").read()
    assert {r.spec.calibration_bos for r in results} == {"text"}  # it reads no windows
    (table,) = compare(results)
    assert [len(cell.scores) for cell in table.cells] == [2, 2]
    assert table.settings == ()


def test_the_token_file_of_a_run_with_bos_gives_the_same_masks(cli, gemma_run, tmp_path):
    cli(*gemma_run, "-m", "wanda", *WINDOW, "--save-calibration", "c.safetensors")
    tokens = [*gemma_run, "-m", "wanda", *WINDOW, "--calibration", "tokens:c.safetensors"]
    cli(*tokens)
    results, _ = ResultStore(tmp_path / "results").read()
    assert len({r.model.evaluated_sha256 for r in results}) == 1


@pytest.mark.parametrize("option", ["--ppl-bos", "--calibration-bos"])
def test_a_tokenizer_without_bos_is_a_usage_error(cli, tiny_run, option):
    output = cli(*tiny_run, "-m", "wanda", option, "window", code=2).output
    assert f"{option} window: the model's tokenizer has no BOS token" in output
    assert "did you mean 'window'" in cli(*tiny_run, "-m", "wanda", option, "windw", code=2).output


def test_the_first_lines_say_which_models_need_bos_in_each_window(cli, gemma_run, tiny_run):
    said = "gemma3_text needs BOS in each window: add "
    both = cli(*gemma_run, "-m", "wanda", "--dry-run").stderr
    assert said + "--ppl-bos window --calibration-bos window (" in both
    assert said + "--ppl-bos window (" in cli(*gemma_run, "-m", "magnitude", "--dry-run").stderr
    left = cli(*gemma_run, "-m", "wanda", "--ppl-bos", "window", "--dry-run")
    assert said + "--calibration-bos window (" in left.stderr
    done = cli(*gemma_run, "-m", "wanda", *WINDOW, "--dry-run")
    assert "needs BOS" not in done.stderr
    assert "tokens of file" in done.stdout and ", BOS in each window" in done.stdout
    assert "needs BOS" not in cli(*tiny_run, "-m", "wanda", "--dry-run").stderr


@pytest.mark.parametrize(
    ("kind", "needed"),
    [("gemma", True), ("gemma2", True), ("gemma3", True), ("gemma3n", True), ("llama", False),
     ("recurrent_gemma", True), ("qwen3", False), ("paligemma", True)],
)  # fmt: skip
def test_the_whole_gemma_family_needs_bos(kind, needed):
    assert needs_window(AutoConfig.for_model(kind)) == needed


def test_the_catalog_marks_the_models_that_need_bos(bos_tokenizer):
    for name, entry in catalog().items():
        assert (entry.bos == "window") == ("gemma" in name), name
    config = AutoConfig.for_model("llama")
    spec = RunSpec(method="wanda")
    assert check_bos(spec, config, bos_tokenizer) == ""
    assert "--ppl-bos window" in check_bos(spec, config, bos_tokenizer, always=True)


def test_an_alias_that_needs_bos_has_it_by_default_in_runs_and_recipes(cli, tmp_path):
    def of(*arguments):
        rows = json.loads(cli("run", "-m", "wanda", *arguments, "--show-config", "--json").stdout)
        return [rows[key]["value"] for key in ("ppl_bos", "calibration_bos")]

    assert of("--model", "gemma3-270m-q4") == ["window", "window"]
    assert of("--model", "gemma3-270m-q4", "--ppl-bos", "text") == ["text", "window"]
    assert of() == of("--model", "llama2-7b") == ["text", "text"]
    path = tmp_path / "r.toml"
    path.write_text('method = "wanda"\nmodel = "gemma3-270m-q4"\n[[grid]]\nseed = [0, 1]\n')
    specs = [cell.spec for cell in read_recipe(path, complete=True).cells]
    assert {(spec.ppl_bos, spec.calibration_bos) for spec in specs} == {("window", "window")}


def test_the_spec_of_an_alias_is_that_of_its_flags():
    """What is at its default by the alias is in the hash as if it were given."""
    given = {"method": "wanda", "model": "gemma3-270m"}
    bos = {"ppl_bos": "window", "calibration_bos": "window"}
    specs = [spec_of(with_defaults(values)) for values in (given, given | bos)]
    assert specs[0] == specs[1] and '"ppl_bos":"window"' in specs[0].canonical_json()
    text = spec_of(with_defaults(given | dict.fromkeys(bos, "text")))
    assert "bos" not in text.canonical_json()


def test_the_recipe_of_a_result_says_text_where_the_alias_would_not(cli, gemma_run, tmp_path):
    cli(*gemma_run, "-m", "wanda")
    (result,), _ = ResultStore(tmp_path / "results").read()
    assert "bos" not in recipe_text(result)
    spec = result.spec.model_copy(update={"model": "gemma3-270m-q4"})
    model = result.model.model_copy(update={"source": "wheel"})
    words = recipe_text(result.model_copy(update={"spec": spec, "model": model}))
    assert 'ppl_bos = "text"' in words and 'calibration_bos = "text"' in words


def test_only_what_is_read_can_need_bos(bos_tokenizer, byte_tokenizer):
    config = AutoConfig.for_model("gemma2")
    plain = RunSpec(method="m", calibration=None, ppl=())
    assert check_bos(plain, config, bos_tokenizer) == ""
    assert "--calibration-bos" in check_bos(plain, config, bos_tokenizer, learns=True)
    with pytest.raises(UsageError, match="--calibration-bos window: the model's tokenizer"):
        check_bos(
            plain.model_copy(update={"calibration_bos": "window"}), config, byte_tokenizer,
            learns=True,
        )  # fmt: skip


def test_a_published_value_stands_only_beside_its_own_protocol(tmp_path):
    def value(protocol):
        return PublishedValue("wanda", "llama2-7b", "0.5", "token_ppl", protocol, 6.9, "here")

    old, new = value("wikitext2-raw/test/2048/v1"), value("wikitext2-raw/test/2048/bos-window/v1")
    assert (old.bos, new.bos) == ("text", "window")
    assert (new.seqlen, new.dataset, new.limit) == (2048, "wikitext2", None)
    assert value("wikitext2-raw/test/2048/bos-window/v1/first-99").limit == 99
    assert not old.fits("token_ppl wikitext2-raw/test/2048/bos-window/v1")
    path = tmp_path / "r.toml"
    path.write_text(
        'method = "wanda"\nmodel = "llama2-7b"\nppl = ["wikitext2"]\nppl_seqlen = 2048\n'
        'calibration_bos = "window"\n[[grid]]\nppl_bos = ["text", "window"]\n'
    )
    text, window = read_recipe(path, complete=True).cells
    assert (text.scores(old), text.scores(new)) == (True, False)
    assert (window.scores(old), window.scores(new)) == (False, True)
    assert window.arguments[-2:] == ["--ppl-bos", "window"]


def test_the_recipe_of_an_exported_model_repeats_bos(cli, gemma_run, tmp_path):
    cli(*gemma_run, "-m", "wanda", *WINDOW, "--save-model", "ck")
    cli("export", "ck", "-o", "out")
    recipe = (tmp_path / "work" / "out" / "recipe.toml").read_text()
    assert 'ppl_bos = "window"' in recipe and 'calibration_bos = "window"' in recipe
    assert "BOS at the beginning of each window" in (tmp_path / "work/out/README.md").read_text()
