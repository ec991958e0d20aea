"""A training that is stopped, damaged, or shared out over processes ends as one that is not."""

import shutil
from dataclasses import replace

import pytest
import torch

from prunebench.calibration.training import Training
from prunebench.errors import IncompatibleData
from prunebench.models.hashing import hash_weights
from prunebench.pruners.maskllm.noise import gumbel
from prunebench.testing import tiny_tokens
from prunebench.training.shards import Shards
from prunebench.training.state_folder import training_info
from tests.mask_training import learner_of, masks_of, one_block, train
from tests.training_runs import Killed, stop_after

# ------------------------------------------------------------ states on disk

KINDS = [
    {"optimizer": "adamw", "noise": 1.0, "clip": 1.0},
    {"optimizer": "momentum", "state_dtype": "int8", "noise_samples": 2, "noise": 0.5},
    {"optimizer": "mirror", "logit_dtype": "bfloat16", "state_dtype": "bfloat16", "rate": 0.5},
    {"optimizer": "adamw", "logit_dtype": "bfloat16", "state_dtype": "int8", "noise": 1.0},
]


def interrupted(folder, step, **options):
    with pytest.raises(Killed):
        train(folder, on_point=stop_after(step), **options)


def same_but_for_time(first, second):
    return [replace(p, seconds=0.0) for p in first.learned.curve] == [
        replace(p, seconds=0.0) for p in second.learned.curve
    ]


@pytest.mark.parametrize(
    "options",
    [*KINDS[:2], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[2:])],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_a_training_that_was_stopped_ends_as_one_that_was_not(options, tmp_path):
    options = {**options, "steps": 5, "prior_noise": 0.5}
    whole, report = train(**options)
    folder, notes = tmp_path / "run", []
    interrupted(folder, 4, save_every=2, **options)  # before step 4 is saved: that of 2 is there
    model, resumed = train(folder, notes=notes, save_every=2, **options)
    assert "resumed after step 2" in notes[0]
    assert hash_weights(model) == hash_weights(whole)
    assert same_but_for_time(report, resumed)
    assert resumed.learned.best_step == report.learned.best_step
    assert (folder / "state").is_dir()  # stays until the result is filed
    assert not (folder / "part").exists()
    Training(tiny_tokens(), tiny_tokens(), folder).forget()
    assert not folder.exists()


def test_of_two_trainings_at_once_the_second_saves_nothing(tmp_path):
    """Both end as each would alone, and the first can be resumed."""
    folder, notes, inner = tmp_path / "run", [], []

    def start_another(point):
        if point.step == 3 and not inner:
            inner.append(train(folder, notes=notes, save_every=1, steps=5))
            assert training_info(folder).running
        if point.step == 4:
            raise Killed

    with pytest.raises(Killed):
        train(folder, on_point=start_another, save_every=2, steps=5)
    (note,) = notes
    assert "another process trains this very command" in note and str(folder) in note
    saved = training_info(folder)
    assert (saved.done, saved.steps, saved.running) == (2, 5, False)
    assert saved.size == sum(p.stat().st_size for p in (folder / "state").iterdir()) > 0
    model, _ = train(folder, notes=notes, save_every=2, steps=5)
    assert "resumed after step 2" in notes[1]
    assert hash_weights(model) == hash_weights(inner[0][0]) == hash_weights(train(steps=5)[0])


def damage_nothing(state):
    pass


def cut(pattern):
    def damage(state):
        path = next(state.glob(pattern))
        path.write_bytes(path.read_bytes()[:-100])

    return damage


def flip(pattern, at):
    def damage(state):
        path = next(state.glob(pattern))
        data = bytearray(path.read_bytes())
        data[int(len(data) * at)] ^= 1
        path.write_bytes(bytes(data))

    return damage


def lose(pattern):
    return lambda state: next(state.glob(pattern)).unlink()


DAMAGES = {
    "cut": cut("*.distcp"),
    "flipped": flip("*.distcp", 0.5),
    "metadata": flip(".metadata", 0.3),
    "facts": flip("progress.json", 0.5),
    "facts cut": cut("progress.json"),
    "no facts": lose("progress.json"),
    "no data": lose("*.distcp"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_never_trusted(damage, tmp_path, kept_state):
    folder, whole = tmp_path / "run", kept_state[1]
    shutil.copytree(kept_state[0], folder)
    DAMAGES[damage](folder / "state")
    notes = []
    model, report = train(folder, notes=notes)
    assert "is damaged: training restarts from step 0" in notes[0]
    assert report.events == ()
    assert hash_weights(model) == whole


@pytest.fixture(scope="module")
def kept_state(tmp_path_factory):
    """The folder `run` of a training that was stopped, and the hash that it should end with."""
    folder = tmp_path_factory.mktemp("kept") / "run"
    interrupted(folder, 3, save_every=2)
    return folder, hash_weights(train()[0])


def test_a_state_of_other_code_is_not_resumed(tmp_path, kept_state):
    folder, notes = tmp_path / "run", []
    shutil.copytree(kept_state[0], folder)
    model, _ = train(folder, notes=notes, code="new", save_every=2)
    assert "of other code, versions, hardware or weights: training restarts from step 0" in notes[0]
    assert hash_weights(model) == kept_state[1]
    train(folder, notes=notes, code="new", save_every=2)  # its own state took the place
    assert "resumed after step 4" in notes[1]


def test_a_kill_between_two_renames_leaves_the_old_state(tmp_path, kept_state):
    folder = tmp_path / "run"
    shutil.copytree(kept_state[0], folder)
    (folder / "state").rename(folder / "old")
    shutil.copytree(folder / "old", folder / "part")
    notes = []
    model, _ = train(folder, notes=notes)
    assert "resumed after step 2" in notes[0]
    assert hash_weights(model) == kept_state[1]


def test_a_state_of_another_run_is_refused_and_stays(tmp_path, kept_state):
    shutil.copytree(kept_state[0], tmp_path / "other")
    with pytest.raises(IncompatibleData, match="not of this run"):
        train(tmp_path / "other")
    assert (tmp_path / "other" / "state").is_dir()


def test_a_disk_that_takes_no_state_does_not_end_the_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    notes = []
    model, report = train(tmp_path / "file" / "run", notes=notes, save_every=2)
    assert [note for note in notes if "could not be saved" in note] == notes
    assert len(notes) == 2
    assert hash_weights(model) == hash_weights(train()[0])


def test_save_every_0_keeps_nothing(tmp_path):
    train(tmp_path / "run", save_every=0)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------ several processes


def learn_together(rank, world, folder, states):
    """One of several processes: learn, and leave masks and noise in a file each."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet-{world}", rank=rank, world_size=world
    )
    try:
        for state, stop in states:
            on_point = stop_after(stop) if stop else lambda point: None
            try:
                model, report = train(folder / state, on_point=on_point, save_every=2, **TOGETHER)
            except Killed:
                continue
            masks = {name: keep.numpy() for name, keep in masks_of(model).items()}
            curve = [point.certainty for point in report.learned.curve]
            torch.save({"masks": masks, "curve": curve, "events": len(report.events),
                        "processes": report.learned.processes},
                       folder / f"{state}-{rank}.pt")  # fmt: skip
    finally:
        dist.destroy_process_group()


TOGETHER = {"optimizer": "momentum", "rate": 0.5, "noise": 1.0, "state_dtype": "int8",
            "logit_dtype": "bfloat16", "prior_noise": 0.5, "clip": 0.0}  # fmt: skip


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_and_go_on_for_each_other(tmp_path):
    """The same noise and masks; a state of one is taken up by two, and one of two by one."""
    model, report = train(**TOGETHER)
    interrupted(tmp_path / "from-one", 3, save_every=2, **TOGETHER)
    context = torch.multiprocessing.start_processes(
        learn_together,
        args=(2, tmp_path, [("whole", 0), ("from-one", 0), ("from-two", 3)]),
        nprocs=2,
        join=False,
        start_method="fork",
    )
    assert any(context.join(timeout=60) for _ in range(10)), "the two processes hang"
    expected = masks_of(model)
    for state, events in (("whole", 0), ("from-one", 1)):
        for rank in range(2):
            got = torch.load(tmp_path / f"{state}-{rank}.pt", weights_only=False)
            assert (got["processes"], got["events"]) == (2, events)
            assert got["curve"] == pytest.approx([p.certainty for p in report.learned.curve])
            for name, keep in expected.items():
                assert torch.equal(torch.from_numpy(got["masks"][name]), keep), (state, name)
    notes = []
    alone, last = train(tmp_path / "from-two", notes=notes, save_every=2, **TOGETHER)
    assert "resumed after step 2" in notes[0]
    assert last.learned.processes == 1
    assert hash_weights(alone) == hash_weights(model)


@pytest.mark.parametrize("world", [2, 3])
def test_a_share_has_the_noise_and_the_mask_of_the_whole(world):
    """The noise bit for bit; the mask but for the rounding of a product of another size."""
    whole = learner_of(one_block())
    how = whole.schedule.relaxation(0, seed=5, draw=7)
    for linear, layer in whole.layers.items():
        out = torch.empty(linear.out_features, linear.in_features)
        layer.soften(linear.read(), how, out)
        count = layer.logits.shape[1]
        drawn = gumbel(torch.arange(count), 6, seed=5, step=7, layer=layer.index)
        for rank in range(world):
            rows = Shards(rank, world).rows(linear.out_features)
            groups = slice(rows.start * layer.width, rows.stop * layer.width)
            noise = gumbel(
                torch.arange(groups.start, groups.stop), 6, seed=5, step=7, layer=layer.index
            )
            assert torch.equal(noise, drawn[:, groups])
            share = replace(layer, logits=layer.logits[:, groups].clone(), first=groups.start)
            part = torch.empty(rows.stop - rows.start, linear.in_features)
            share.soften(linear.read()[rows], how, part)
            assert torch.allclose(part, out[rows], atol=1e-6)
