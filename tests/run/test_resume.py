"""A run on disk goes on after anything: a kill, Ctrl-C, a full disk, damaged state; same bits."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prunebench.errors import SaveError
from prunebench.models.disk import load_on_disk
from prunebench.models.hashing import hash_weights
from prunebench.models.journal import RunJournal, journal_info
from prunebench.models.load import load_config
from prunebench.models.walker import BlockWalker
from prunebench.pruners import METHODS
from prunebench.results import versions
from prunebench.results.store import ResultStore
from prunebench.run.resolve import resolve
from prunebench.run.resume import journal_folder
from prunebench.sparsity import Sparsity
from prunebench.spec import RunSpec, Setup
from prunebench.testing import tiny_model, tiny_tokens

CPU = torch.device("cpu")
PROCESSES = Path(__file__).parents[1] / "scripts" / "processes.py"


class Killed(BaseException):
    """What a kill is to the code: nothing behind it runs."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("resume") / "tiny"
    tiny_model("llama").save_pretrained(path)
    return path


def prune(folder, journal_folder, *, method="sparsegpt", order="joint", stop_at=None):
    """Prune on disk, going on from what is kept; `stop_at` a block, in the middle of it."""
    journal = RunJournal(journal_folder)
    assert journal.lock()
    journal.read()
    model = load_on_disk(
        folder, load_config(folder), dtype=torch.float32, device=CPU, journal=journal
    )
    walker = BlockWalker(model, token_ids=tiny_tokens(), within_block=order, batch_tokens=48)
    walker._weights.restore_blocks()
    visited = []
    plain = walker._weights.save_block

    def keep(index, **options):
        visited.append(index)
        if index == stop_at:
            raise Killed
        plain(index, **options)

    walker._weights.save_block = keep
    report = None
    try:
        pruner = METHODS.make(method, {})
        report = pruner.prune(walker, {x.name: Sparsity.parse("0.5") for x in walker.linears})
    except Killed:
        pass
    finally:
        journal.release()
    return (hash_weights(model) if report else None), report, visited


@pytest.mark.parametrize("order", ["joint", "sequential"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "magnitude"])
def test_it_goes_on_at_the_first_unfinished_block(folder, tmp_path, method, order):
    whole = prune(folder, tmp_path / "whole", method=method, order=order)
    _, _, first = prune(folder, tmp_path / "kept", method=method, order=order, stop_at=1)
    _, _, second = prune(folder, tmp_path / "kept", method=method, order=order, stop_at=2)
    sha256, report, third = prune(folder, tmp_path / "kept", method=method, order=order)
    assert (first, second, third) == ([0, 1], [1, 2], [2])
    assert (sha256, report) == whole[:2]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("name", "redone", "damage"),
    [
        ("block-00000", [0, 1, 2], flip),
        ("block-00001", [1, 2], cut),
        ("block-00001", [1, 2], Path.unlink),
        ("hidden-00002", [2], flip),
        ("hidden-00002", [2], Path.unlink),
        ("journal", [0, 1, 2], flip),
        ("journal", [0, 1, 2], cut),
    ],
)
def test_damaged_state_is_found_by_its_hash_and_done_again(folder, tmp_path, name, redone, damage):
    expected = prune(folder, tmp_path / "whole")[:2]
    prune(folder, tmp_path / "kept", stop_at=2)
    (path,) = (tmp_path / "kept").glob(f"{name}*")
    damage(path)
    sha256, report, visited = prune(folder, tmp_path / "kept")
    assert (sha256, report) == expected
    assert visited == redone


def test_a_folder_belongs_to_one_process(tmp_path):
    first, second = RunJournal(tmp_path / "kept"), RunJournal(tmp_path / "kept")
    assert first.lock()
    assert not second.lock()
    assert journal_info(tmp_path / "kept").running
    first.release()
    assert second.lock()


def test_a_full_disk_loses_nothing_that_was_kept(folder, tmp_path, monkeypatch):
    """The write of block 1 fails; after that there is room again."""
    from prunebench.models import journal as module

    plain, calls = module.write_tensors, []

    def full(path, tensors):
        calls.append(path.name)
        if "block-00001" in path.name:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return plain(path, tensors)

    expected = prune(folder, tmp_path / "whole")[:2]
    monkeypatch.setattr(module, "write_tensors", full)
    with pytest.raises(SaveError, match="cannot write .*block-00001") as error:
        prune(folder, tmp_path / "kept")
    assert "free space" in error.value.fix
    assert not list((tmp_path / "kept").glob(".*part"))
    monkeypatch.undo()
    sha256, report, visited = prune(folder, tmp_path / "kept")
    assert ((sha256, report), visited) == (expected, [1, 2])


# ---------------------------------------------------------------- whole commands


def the_result(root):
    results, damaged = ResultStore(root).read()
    assert not damaged
    (result,) = [row for row in results if row.status == "ok"]
    return result


def numbers(result):
    return result.model_dump(exclude={"id", "created_at", "command", "cost"})


MINE = """
from dataclasses import dataclass
from prunebench.pruners.wanda import Wanda

@dataclass(frozen=True)
class Mine(Wanda):
    pass
"""


def test_what_other_code_has_saved_is_not_resumed(tiny_folder, text_file, tmp_path, monkeypatch):
    """A new version of any part, or a changed file of a class of elsewhere, begins anew."""
    file = tmp_path / "mine_to_resume.py"
    file.write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    ours = {"method": "wanda", "allocation": "owl", "recover": "block"}
    theirs = {"method": "mine_to_resume:Mine"}

    def folder_of(options):
        spec = RunSpec(
            model=str(tiny_folder), calibration=f"file:{text_file}", calibration_samples=4,
            seqlen=32, ppl=(), **options,
        )  # fmt: skip
        return journal_folder(resolve(spec, Setup(results_dir=tmp_path / "results")))

    before = [folder_of(ours), folder_of(theirs)]
    assert [folder_of(ours), folder_of(theirs)] == before
    file.write_text(f"{MINE}\n# another threshold\n")
    assert folder_of(theirs) != before[1]
    assert folder_of(ours) == before[0]
    file.write_text(MINE)
    assert folder_of(theirs) == before[1]
    # a module beside it counts once it is loaded, and a module of elsewhere does not
    (tmp_path / "elsewhere").mkdir()
    for helper in (tmp_path / "elsewhere" / "far_from_mine.py", tmp_path / "beside_mine.py"):
        helper.write_text("THRESHOLD = 1")
        monkeypatch.syspath_prepend(str(helper.parent))
        monkeypatch.setitem(sys.modules, helper.stem, importlib.import_module(helper.stem))
        assert (folder_of(theirs) != before[1]) == (helper.parent == tmp_path)
    beside = folder_of(theirs)
    helper.write_text("THRESHOLD = 2")
    assert folder_of(theirs) != beside
    assert folder_of(ours) == before[0]
    for part in ("method wanda", "allocator owl", "recoverer block"):
        change = versions.Change((part,), "2027-01-01", "something else")
        with monkeypatch.context() as patched:
            patched.setattr(versions, "CHANGES", (*versions.CHANGES, change))
            assert folder_of(ours) != before[0], part


@pytest.mark.slow
def test_the_same_command_goes_on_and_says_what_it_kept(cli, tiny_run, tmp_path, monkeypatch):
    from prunebench.run import pruning

    command = [*tiny_run, "-m", "wanda", "--divergence", "--weights", "disk"]
    assert "nothing is saved" in cli(*command, "--resume-info").output
    plain, stages = pruning.hash_weights, []

    def stopped(model, **options):
        stages.append(1)
        if len(stages) == 2:  # the weights that were pruned
            raise KeyboardInterrupt
        return plain(model, **options)

    monkeypatch.setattr(pruning, "hash_weights", stopped)
    outcome = cli(*command, code=130)
    assert "3 finished blocks saved; rerun the same command to resume" in outcome.output
    monkeypatch.undo()
    monkeypatch.setenv("PRUNEBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path / "work")
    assert "3 of 3 blocks" in cli(*command, "--resume-info").output
    assert "3 of 3 blocks" in cli("clean", "--list").output
    outcome = cli(*command)
    assert "resuming: 3 blocks finished before" in outcome.output
    again = the_result(tmp_path / "results")
    assert again.cost.starts == 2
    cli(*tiny_run, "-m", "wanda", "--divergence", "--results-dir", "fresh")
    assert numbers(again) == numbers(the_result(Path("fresh")))
    assert cli("clean").output == "nothing is saved\n"


def test_clean_removes_what_is_kept(cli, folder, tmp_path):
    prune(folder, tmp_path / "cache" / "runs" / "abc", stop_at=2)
    assert "removed" in cli("clean").output
    assert not list((tmp_path / "cache" / "runs").iterdir())


def clean_processes(arguments, root, *, before=()):
    """Run `processes.py` in a process of its own, in `root`."""
    done = subprocess.run(
        [*before, sys.executable, PROCESSES, *map(str, arguments)], cwd=root, capture_output=True,
        text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def in_one_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNEBENCH_CACHE", str(tmp_path / "cache"))


@pytest.mark.slow
def test_kills_at_random_moments_end_with_the_same_bits(tiny_run, tmp_path, in_one_cache):
    command = [*tiny_run, "-m", "sparsegpt", "--weights", "disk", "--save-model", "out", "-q"]
    clean_processes(["kill", 30, *command], tmp_path)


@pytest.mark.slow
def test_eight_at_once_in_one_cache_and_results_folder(tiny_run, tmp_path, in_one_cache):
    command = [*tiny_run, "-m", "wanda", "--weights", "disk", "-q"]
    clean_processes(["together", 8, *command], tmp_path)
    results, damaged = ResultStore(tmp_path / "results").read()
    assert (len(results), damaged) == (8, [])
    assert len({result.model.evaluated_sha256 for result in results}) == 1


@pytest.mark.slow
def test_a_full_disk_at_every_write(tiny_run, tmp_path, in_one_cache):
    """A small tmpfs, in a mount namespace of its own; a run goes on whenever a little is freed."""
    (tmp_path / "small").mkdir()
    mounted = 'mount -t tmpfs -o size=4m none small && exec "$@"'
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    clean_processes(
        ["full", 8192, *tiny_run, "-m", "sparsegpt", "--weights", "disk", "-q"], tmp_path,
        before=["unshare", *user, "--mount", "sh", "-c", mounted, "sh"],
    )  # fmt: skip
