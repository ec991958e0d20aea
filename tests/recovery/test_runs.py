"""Recovery in whole runs: the row, the table, disk and resuming, and what is refused."""

import json

import pytest
import torch

from prunebench.models.disk import load_on_disk
from prunebench.models.hashing import hash_weights
from prunebench.models.journal import RunJournal
from prunebench.models.linears import find_linears
from prunebench.models.load import load_config, load_model
from prunebench.models.pruned_block import Recovery
from prunebench.models.walker import BlockWalker
from prunebench.models.weights import weights_of
from prunebench.pruners import METHODS
from prunebench.recovery import RECOVERERS
from prunebench.recovery.block import Block
from prunebench.results.store import ResultStore
from prunebench.sparsity import Sparsity
from prunebench.testing import tiny_model, tiny_tokens
from tests.training_runs import learned_masks

CPU = torch.device("cpu")
RECOVER = ["--recover", "block", "--calibration-samples", "8", "--set", "recover.lr=0.02"]

OUTSIDE = """
from dataclasses import dataclass
from prunebench.plugin import BlockRecoverer, RecoveredBlock

@dataclass(frozen=True)
class Shrinks(BlockRecoverer):
    \"\"\"Scales the kept weights.\"\"\"
    factor: float = 0.99

    def recover_block(self, pruned):
        for linear in pruned.linears:
            if (linear.stored == 0).any():
                linear.stored.mul_(self.factor).add_(0.0)
        return RecoveredBlock(pruned.index)
"""


def rows_of(tmp_path):
    rows, _ = ResultStore(tmp_path / "results").read()
    return [row for row in rows if row.status == "ok"]


# ---------------------------------------------------------------- the row


def test_a_row_says_what_the_recovery_did(cli, tiny_run, tmp_path):
    outcome = cli(*tiny_run, "-m", "wanda", "--sparsity", "2:4", *RECOVER)
    (row,) = rows_of(tmp_path)
    recovery = row.recovery
    assert row.spec.recover == "block" and row.spec.recover_options["lr"] == 0.02
    assert (recovery.windows, recovery.held_out_windows, recovery.seqlen) == (7, 1, 32)
    assert recovery.tokens == 3 * 7 * 32
    assert [block.block for block in recovery.blocks] == [0, 1, 2]
    for block in recovery.blocks:
        assert block.held_out_after <= block.held_out_before
        assert (block.best_step > 0) == (block.held_out_after < block.held_out_before)
    assert recovery.held_out_after < recovery.held_out_before
    assert recovery.recovered_blocks == sum(block.best_step > 0 for block in recovery.blocks)
    assert recovery.seconds > 0 and row.cost.prune_seconds > 0
    stage = row.cost.stage_seconds["prune"]
    assert row.cost.prune_seconds + recovery.seconds == pytest.approx(stage, abs=0.2)
    assert row.sparsity.pattern_violations == row.sparsity.negative_zeros == 0
    assert "wanda 2:4, then block on tiny-llama" in outcome.stdout
    assert "recovered by block: held-out error" in outcome.stdout
    assert "block 0: held-out error" in outcome.stderr


@pytest.mark.parametrize("recover", [[], RECOVER], ids=["as pruned", "recovered"])
def test_joint_weights_of_two_bits_are_a_row(cli, tiny_run, tmp_path, recover):
    run = [*tiny_run, "-m", "sparsegpt", "--sparsity", "2:4", "--set", "quantize_bits=2"]
    cli(*run, *recover)
    (row,) = rows_of(tmp_path)
    # a grid of four values rounds many kept weights to 0: more than half are zero, and 2:4 holds
    assert row.sparsity.realised_ratio > 0.52 and row.sparsity.pattern_violations == 0
    assert row.quantization.bits == 2 and row.quantization.exact
    assert (row.recovery is not None) == bool(recover)


def test_rows_with_and_without_never_share_a_line(cli, tiny_run, tmp_path):
    run = [*tiny_run, "-m", "magnitude", "--sparsity", "0.5", "-q"]
    cli(*run)
    cli(*run, *RECOVER)
    cli(*run, *RECOVER, "--set", "recover.epochs=1")
    plain, *recovered = sorted(rows_of(tmp_path), key=lambda row: row.recovery is not None)
    # without recovery, magnitude reads no data and its hash is the old one; with it, it does
    assert plain.spec.calibration is None and plain.calibration is None
    assert "recover" not in json.loads(plain.spec.canonical_json())
    assert '"recovery"' not in plain.to_json()
    assert all(row.calibration.samples == 8 for row in recovered)
    assert len({row.spec_id for row in (plain, *recovered)}) == 3
    table = cli("compare", "--results-dir", str(tmp_path / "results")).output
    assert "magnitude + block" in table and "epochs=1" in table
    store = ["--results-dir", str(tmp_path / "results"), "--json"]
    for selector, count in (("recover=block", 2), ("recover=none", 1), ("set.recover.epochs=1", 1)):
        (found,) = json.loads(cli("compare", selector, *store).stdout)
        assert len([cell for cell in found["cells"] if cell["method"] != "dense"]) == count


def test_once_finds_a_row_by_its_recovery(cli, tiny_run, tmp_path):
    run = [*tiny_run, "-m", "magnitude", "--once"]
    cli(*run, *RECOVER)
    assert "has the same specification" in cli(*run, *RECOVER).output
    cli(*run)
    assert len(rows_of(tmp_path)) == 2


def test_massive_channels_are_said_and_recorded(cli, tiny_run, tiny_folder, held, tmp_path):
    model, tokenizer = held
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] *= 1000  # one of 32 channels
    folder = tmp_path / "massive"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    massive = [str(folder) if word == str(tiny_folder) else word for word in tiny_run]
    words = ["-m", "magnitude", "--sparsity", "2:4", *RECOVER]
    channels = ["--set", "recover.loss=channels"]
    warned = cli(*massive, *words).stderr
    assert "warning: a hundredth of the channels holds" in warned
    assert "a hundredth" not in cli(*massive, *words, *channels).stderr
    then = [*words, "--set", "recover.distill.steps=1", "--set", "recover.distill.batch=2"]
    then = ["block+distill" if word == "block" else word for word in then]
    then = [word.replace("recover.lr", "recover.block.lr") for word in then]
    then += ["--set", "recover.distill.seqlen=24", "--set", "recover.distill.held_out=2"]
    assert "warning: a hundredth of the channels holds" in cli(*massive, *then).stderr
    assert "a hundredth" not in cli(*tiny_run, *words).stderr
    shares = [block.massive for row in rows_of(tmp_path) for block in row.recovery.blocks]
    assert sum(share > 0.85 for share in shares) == 3 * sum(share < 0.5 for share in shares) > 0


def test_a_rate_that_makes_every_block_worse_keeps_nothing_and_says_so(cli, tiny_run, tmp_path):
    run = [*tiny_run, "-m", "wanda", "--sparsity", "2:4", "--calibration-samples", "8"]
    outcome = cli(*run, "--recover", "block", "--set", "recover.lr=50")
    cli(*run)
    useless, plain = sorted(rows_of(tmp_path), key=lambda row: row.recovery is None)
    assert useless.recovery.recovered_blocks == 0
    assert useless.model.evaluated_sha256 == plain.model.evaluated_sha256
    assert "warning: block kept nothing" in outcome.stderr
    assert "warning: the recovery kept nothing" in outcome.stdout


@pytest.mark.slow
def test_a_model_that_learns_its_masks_is_recovered_after_it(cli, tiny_run, text_file, tmp_path):
    learn = learned_masks(text_file)
    cli(*tiny_run, *learn, "--save-masks", "plain.npz")
    cli(*tiny_run, *learn, *RECOVER, "--save-masks", "recovered.npz")
    plain, recovered = sorted(rows_of(tmp_path), key=lambda row: row.recovery is not None)
    assert len(recovered.recovery.blocks) == 3 and recovered.recovery.recovered_blocks > 0
    assert plain.model.evaluated_sha256 != recovered.model.evaluated_sha256
    assert recovered.training.tokens_sha256 == plain.training.tokens_sha256
    work = tmp_path / "work"
    assert (work / "plain.npz").read_bytes() == (work / "recovered.npz").read_bytes()
    # the same from the masks of a file, in one walk
    masks = ["-m", "maskllm", "--set", f"masks={work / 'plain.npz'}"]
    cli(*tiny_run, *masks, *RECOVER)
    third = next(row for row in rows_of(tmp_path) if "masks" in row.spec.method_options)
    assert third.model.evaluated_sha256 == recovered.model.evaluated_sha256


def test_an_exported_recipe_repeats_the_recovery(cli, tiny_run, tmp_path):
    cli(*tiny_run, "-m", "wanda", "--sparsity", "2:4", *RECOVER, "--save-model", "out")
    outcome = cli("export", "out", "-o", "hub")
    assert outcome.exit_code == 0
    recipe = (tmp_path / "work" / "hub" / "recipe.toml").read_text("utf-8")
    assert 'recover = "block"' in recipe and "[set.recover]" in recipe and "lr = 0.02" in recipe
    assert "kept weights trained afterwards by `block`" in (
        tmp_path / "work" / "hub" / "README.md"
    ).read_text("utf-8")


def test_a_dry_run_counts_it(cli, tiny_run):
    run = [*tiny_run, "-m", "wanda", "--calibration-samples", "64", "--ppl", "", "--dry-run"]
    plain = cli(*run).output
    recovered = cli(*run, "--recover", "block", "--set", "recover.batch=56").output
    assert "recovery    block: batch=56\n" in recovered and "recover " in recovered
    assert "recovery    block: with its defaults\n" in cli(*run, "--recover", "block").output
    for part in ("recovery: master, moments", "recovery: batch", "dense stream of the recovery"):
        assert part in recovered and part not in plain


def test_recoverers_are_listed_and_shown(cli, tiny_run):
    row, distill = json.loads(cli("list", "recoverers", "--json").stdout)
    assert (row["name"], row["paper"], row["data"]) == ("block", "2406.15524", True)
    assert (distill["name"], distill["paper"]) == ("distill", "2407.20584")
    shown = cli(*tiny_run, "-m", "wanda", *RECOVER, "--show-config").output
    assert "recover_options" in shown and "'lr': '0.02'" in shown


def test_a_recipe_has_a_table_for_it(cli, tiny_run, tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        'method = "magnitude"\nrecover = "block"\ncalibration_samples = 8\n'
        "[set.recover]\nlr = 0.02\nepochs = 1\n",
        "utf-8",
    )
    words = [word for word in tiny_run if word != "4"]
    words.remove("--calibration-samples")
    cli(*words, "--recipe", recipe)
    (row,) = rows_of(tmp_path)
    assert (row.spec.recover_options["lr"], row.spec.recover_options["epochs"]) == (0.02, 1)


# ---------------------------------------------------------------- disk and resuming


class Killed(BaseException):
    """What a kill is to the code: nothing behind it runs."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("recover") / "tiny"
    tiny_model("llama").save_pretrained(path)
    return path


def prune(model, *, target="dense", order="joint", method="wanda", stop_at=None):
    """Prune and recover; `stop_at` a block, before it is saved. Returns its hash, if finished."""
    walker = BlockWalker(
        model, token_ids=tiny_tokens(samples=8), within_block=order, batch_tokens=48,
        recovery=Recovery(Block(lr=0.02, target=target)),
    )  # fmt: skip
    plain = walker._weights.save_block

    def save(index, **options):
        if index == stop_at:
            raise Killed
        plain(index, **options)

    walker._weights.save_block = save
    goal = {linear.name: Sparsity.parse("2:4") for linear in walker.linears}
    try:
        METHODS.make(method, {}).prune(walker, goal)
    except Killed:
        return None, walker.recovered
    return hash_weights(model), walker.recovered


def on_disk(folder, journal_folder, *, placement="device"):
    journal = RunJournal(journal_folder)
    assert journal.lock()
    journal.read()
    model = load_on_disk(
        folder, load_config(folder), dtype=torch.float32, device=CPU, journal=journal,
        placement=placement,
    )  # fmt: skip
    return model, journal


def numbers(records):
    return [(r.block, r.held_out_before, r.held_out_after, r.best_step) for r in records]


@pytest.mark.parametrize(
    ("target", "order", "method", "placement"),
    [
        ("dense", "joint", "wanda", "disk"),
        pytest.param("local", "joint", "magnitude", "cpu", marks=pytest.mark.slow),
        pytest.param("dense", "sequential", "sparsegpt", "device", marks=pytest.mark.slow),
    ],
)
def test_resident_disk_and_resumed_give_the_same_bits(
    folder, tmp_path, target, order, method, placement
):
    options = {"target": target, "order": order, "method": method}
    resident, expected = prune(load_model(folder, dtype=torch.float32, device=CPU), **options)
    for stops in ((None,), (1, 2, None)):
        for stop in stops:
            model, journal = on_disk(folder, tmp_path / f"{len(stops)}", placement=placement)
            weights_of(model).restore_blocks()
            sha256, records = prune(model, stop_at=stop, **options)
            journal.release()
        assert sha256 == resident
        assert numbers(records) == numbers(expected)


def test_a_lost_stream_is_computed_again(folder, tmp_path):
    resident, _ = prune(load_model(folder, dtype=torch.float32, device=CPU))
    model, journal = on_disk(folder, tmp_path / "kept")
    prune(model, stop_at=2)
    journal.release()
    (hidden,) = (tmp_path / "kept").glob("hidden-*")
    hidden.write_bytes(b"")
    model, journal = on_disk(folder, tmp_path / "kept")
    weights_of(model).restore_blocks()
    assert prune(model)[0] == resident
    journal.release()


def test_a_run_on_disk_is_the_same_row(cli, tiny_run, tmp_path):
    for weights in ("resident", "disk"):
        cli(*tiny_run, "-m", "sparsegpt", *RECOVER, "--weights", weights, "-q")
    first, second = rows_of(tmp_path)
    assert first.model == second.model and first.scores == second.scores
    assert first.sparsity == second.sparsity and first.spec == second.spec
    strip = {"seconds", "blocks"}
    assert first.recovery.model_dump(exclude=strip) == second.recovery.model_dump(exclude=strip)


# ---------------------------------------------------------------- bad input, and others' recoverers


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["-m", "dense", *RECOVER], 2, ["does not go with the method dense"]),
        (["-m", "wanda", "--recover", "blck"], 2, ["unknown recoverer", "did you mean 'block'?"]),
        (["-m", "wanda", *RECOVER, "--set", "recover.rate=1"], 2, ["block has no option 'rate'"]),
        (["-m", "wanda", *RECOVER, "--set", "recover.epochs=0"], 2, ["epochs=0 is not 1 or more"]),
        (["-m", "wanda", *RECOVER, "--set", "recover.epochs=x"], 2, ["epochs='x' is not valid"]),
        (["-m", "wanda", *RECOVER, "--set", "recover.target=dens"], 2, ["did you mean dense?"]),
        (["-m", "wanda", "--set", "recover.lr=1"], 2, ["--set recover.lr goes with --recover"]),
        (["-m", "wanda", "--recover", "block"], 2, ["4 calibration windows are too few"]),
        (["-m", "wanda", "--recover", "no_such:X"], 2, ["cannot be imported"]),
        (
            ["-m", "sparsegpt", *RECOVER, "--set", "quantize_bits=4", "--dtype", "bfloat16"],
            2,
            ["does not go with a grid and --dtype bfloat16"],
        ),
        (
            ["-m", "sparsegpt", "--recover", "distill", "--set", "quantize_bits=4"],
            2,
            ["does not go with weights that are rounded to a grid"],
        ),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_wrong_options(cli, tiny_run, tmp_path, arguments, code, says):
    output = cli(*tiny_run, *arguments, code=code).output
    for part in says:
        assert part in output
    assert not list((tmp_path / "results").rglob("*.json"))


def test_the_scored_text_is_not_trained_on(cli, tiny_run, eval_file):
    run = [*tiny_run, "-m", "magnitude", *RECOVER, "--calibration", f"file:{eval_file}"]
    assert "calibrated on and evaluated on" in cli(*run, code=2).output


def test_masks_of_another_model_are_refused(cli, tiny_run, byte_tokenizer, tmp_path):
    cli(*tiny_run, "-m", "magnitude", "--sparsity", "2:4", "--save-masks", "m.npz")
    tiny_model("gpt2").save_pretrained(tmp_path / "other")
    byte_tokenizer.save_pretrained(tmp_path / "other")
    masks = ["-m", "maskllm", "--set", "masks=m.npz", "-M", tmp_path / "other"]
    assert "masks" in cli(*tiny_run, *masks, *RECOVER, code=4).output


def test_a_method_that_does_not_walk_is_refused(cli, tiny_run, tmp_path):
    code = """
from dataclasses import dataclass
from prunebench.pruners.protocol import Needs, PruneReport
from prunebench.pruners.magnitude import Magnitude

@dataclass(frozen=True)
class Alone:
    needs = Needs()
    def prune(self, walker, sparsity):
        for linear in walker.linears:
            linear.write(Magnitude().prune_weight(linear.read(), None, sparsity[linear.name]))
        return PruneReport()
"""
    (tmp_path / "work" / "alone.py").write_text(code)
    output = cli(*tiny_run, "-m", "alone:Alone", *RECOVER, code=6).output
    assert "3 of 3 blocks were not recovered" in output


def test_a_recoverer_from_outside(cli, tiny_run, tmp_path):
    (tmp_path / "work" / "outside.py").write_text(OUTSIDE)
    assert "passes all" in cli("check", "recover:outside:Shrinks").output
    run = [*tiny_run, "-m", "magnitude", "--recover", "outside:Shrinks"]
    outcome = cli(*run, "--set", "recover.factor=0.9")
    assert "no error was measured" in outcome.stderr
    (row,) = rows_of(tmp_path)
    assert row.recovery.implementation == "outside:Shrinks"
    assert row.recovery.held_out_before is None
    assert "recovered by outside:Shrinks, in 0 of 3 blocks" in outcome.stdout
    assert RECOVERERS.load("outside:Shrinks").__doc__ == "Scales the kept weights."


def test_what_is_no_recoverer(cli, tiny_run, tmp_path):
    (tmp_path / "work" / "wrong.py").write_text(OUTSIDE.replace("(BlockRecoverer)", ""))
    output = cli(*tiny_run, "-m", "wanda", "--recover", "wrong:Shrinks", code=2).output
    assert "wrong:Shrinks is not a recoverer" in output
    # all that the registry asks for, but neither kind: it would be named in a row and never called
    alike = OUTSIDE.replace("(BlockRecoverer)", "") + "    needs = None\n    check = print\n"
    (tmp_path / "work" / "alike.py").write_text(alike)
    output = cli(*tiny_run, "-m", "wanda", "--recover", "alike:Shrinks", code=2).output
    assert "neither a BlockRecoverer nor a ModelRecoverer" in output


def test_a_walk_without_recovery_has_none():
    walker = BlockWalker(tiny_model("llama"), token_ids=tiny_tokens())
    METHODS.make("wanda", {}).prune(
        walker, {linear.name: Sparsity.parse("2:4") for linear in find_linears(walker.model)}
    )
    assert walker.recovered == []
