"""`prunebench recommend` on a tiny model: it finds, resumes, misses, and refuses."""

import json

import pytest

from prunebench.results.store import ResultStore


def rows(tmp_path):
    return ResultStore(tmp_path / "results").read()[0]


def found(cli, ask, *more, code=0):
    return json.loads(cli(*ask, "-q", "--json", *more, code=code).stdout)


def test_it_finds_confirms_saves_and_runs_nothing_twice(cli, ask, here, tmp_path):
    folder = tmp_path / "checkpoint"
    first = found(cli, ask, "--floor", "ppl=1.5x", "--save", folder)
    chosen = first["chosen"]
    assert chosen["unseen"] and chosen["value"] <= 1.5
    row = next(r for r in rows(tmp_path) if r.id == chosen["result_id"])
    (score,) = row.scores
    assert score.value / score.dense_value == pytest.approx(chosen["value"])
    # the confirmation is on windows that no round has scored, and the checkpoint is of that row
    raced = {t["protocol"].split("/")[0] for t in first["trials"] if not t["unseen"]}
    assert len(raced) == 1 and chosen["protocol"].split("/")[0] not in raced
    assert json.loads((folder / "prunebench.json").read_text())["id"] == row.id
    # smaller ones were tried, larger ones were not
    assert "rtn INT8" in first["not_run"] and not first["cut_by_budget"]
    count = len(rows(tmp_path))
    again = found(cli, ask, "--floor", "ppl=1.5x", "--save", folder)
    assert here.newest.ran == [] and len(rows(tmp_path)) == count
    assert all(trial.pop("was_there") for trial in again["trials"])
    same = [{k: v for k, v in t.items() if k != "was_there"} for t in first["trials"]]
    assert again["trials"] == same and again["chosen"]["result_id"] == row.id


@pytest.mark.slow
def test_a_race_that_was_stopped_goes_on_in_the_same_order(cli, ask, here, tmp_path, monkeypatch):
    whole = found(cli, ask, "--floor", "ppl=1.01x", "--results-dir", tmp_path / "whole")
    wait, calls = here.wait, []

    def interrupted(engine):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return wait(engine)

    monkeypatch.setattr(here, "wait", interrupted)
    outcome = cli(*ask, "--floor", "ppl=1.01x", code=130)
    assert "resume with: prunebench" in outcome.stderr
    assert "rtn INT3" in outcome.stdout and "not run (interrupted)" in outcome.stdout
    assert len(rows(tmp_path)) == 2
    monkeypatch.setattr(here, "wait", wait)
    rest = found(cli, ask, "--floor", "ppl=1.01x")
    assert [t["was_there"] for t in rest["trials"]][:3] == [True, True, False]

    def facts(document):
        return [(t["name"], t["round"], t["unseen"], t["value"]) for t in document["trials"]]

    assert facts(rest) == facts(whole)


def test_nothing_holds_the_floor(cli, ask, here):
    # of a random model a pruned one may be better than dense: a floor that none can hold
    outcome = cli(*ask, "--floor", "ppl=1.0x", "--goal", "2:4", "--budget", "0.001s", code=6)
    assert "nothing within the budget holds the floor" in outcome.stderr
    assert "the same command resumes" in outcome.stderr
    assert "not run (the budget)" in outcome.stdout


def test_the_nearest_is_shown(cli, ask, here, monkeypatch):
    import prunebench.recommend.search as search
    from prunebench.recommend.values import Value

    monkeypatch.setattr(
        search, "perplexity_value", lambda result: Value(3.0 + result.spec.seed, 3.0, 1.0, "p")
    )
    monkeypatch.setattr(search, "candidates_for", lambda goal, counts: CANDIDATES)
    outcome = cli(*ask, "--floor", "ppl=2x", code=6)
    assert "the nearest is magnitude 2:4: 3.000x on the text of the race" in outcome.stderr
    assert "another half hour" in outcome.stdout


def test_what_failed_is_not_counted_as_tried(cli, ask, here, monkeypatch):
    import prunebench.recommend.search as search
    from prunebench.recommend.candidates import Candidate
    from prunebench.recommend.values import Value

    # M divides no width of the model
    broken = Candidate("magnitude 3:7", 0, {"method": "magnitude", "sparsity": "3:7"}, 10)
    monkeypatch.setattr(search, "candidates_for", lambda goal, counts: (broken, *CANDIDATES))
    monkeypatch.setattr(search, "perplexity_value", lambda result: Value(1.5, 1.5, 1.0, "p"))
    outcome = cli(*ask, "--floor", "ppl=2x")
    assert "recommended: magnitude 2:4" in outcome.stdout
    assert "nothing smaller is left to try, but for what failed" in outcome.stdout
    assert "not known to miss the floor: magnitude 3:7" in outcome.stdout
    outcome = cli(*ask, "--floor", "ppl=1.2x", code=6)
    assert "1 failed, and nothing is known of those" in outcome.stderr


@pytest.mark.slow
def test_a_dry_run_runs_nothing(cli, ask, here, tmp_path):
    outcome = cli(*ask, "--floor", "ppl=2x", "--goal", "speed", "--dry-run")
    assert "round 3: 6 calibration windows, 32 scored windows" in outcome.stdout
    assert "depth 0.3 of the blocks" in outcome.stdout and "magnitude 2:4" in outcome.stdout
    assert not list((tmp_path / "results").rglob("*.json"))


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        (["--floor", "ppl"], 2, "--floor 'ppl' is not understood"),
        (["--floor", "ppl=0.5x"], 2, "is out of range"),
        (["--floor", "ppl=2x", "--goal", "size"], 2, "unknown goal 'size'"),
        (["--floor", "ppl=2x", "--budget", "soon"], 2, "--budget 'soon' is no duration"),
        (["--floor", "ppl=2x", "--bos", "both"], 2, "--bos 'both' is not known"),
        (["--floor", "ppl=2x", "--text", "file:none.txt"], 3, "given to --text"),
        (["--floor", "ppl=2x", "--text", "wikki"], 2, "did you mean 'wiki'"),
        (["--floor", "ppl=2x", "--text", "{calibration}"], 2, "calibrated on and evaluated on"),
        (["--floor", "ppl=2x", "--ppl-seqlen", "2500"], 4, "is too short for two parts"),
        (["--floor", "ppl=2x", "-M", "no-such-model"], 2, "no-such-model"),
        (["--floor", "ppl=2x", "--save", "{taken}"], 2, "taken"),
        # each of these would fail every run, or every run that reads data
        (["--floor", "ppl=2x", "--device", "cuda"], 3, "cuda"),
        (
            ["--floor", "ppl=2x", "--calibration-samples", "999"],
            4,
            "--calibration-samples 775 or",
        ),
        (["--floor", "recovery=95%", "--calibration", "c5"], 2, "unknown text 'c5'"),
        (["--floor", "recovery=95%", "--tasks", ","], 2, "--tasks names no task"),
    ],
)
def test_what_is_wrong_is_said_in_one_message(cli, ask, here, tmp_path, more, code, says):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("mine")
    calibration = ask[ask.index("--calibration") + 1]
    words = [w.format(calibration=calibration, taken=taken) for w in more]
    outcome = cli(*ask, *words, code=code)
    assert says in outcome.stderr
    errors = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert not list((tmp_path / "results").rglob("*.json"))


def _candidates():
    from prunebench.recommend.candidates import Candidate

    options = {"method": "magnitude", "sparsity": "2:4"}
    return (Candidate("magnitude 2:4", 0, options, 1000),)


CANDIDATES = _candidates()


def test_its_pages_fit_the_terminal(cli, ask, here, monkeypatch):
    from prunebench.cli import console

    shown = {}
    for columns in (None, 80, 120):
        monkeypatch.setattr(console, "terminal_width", lambda err=False, c=columns: c)
        page = cli(*ask, "--floor", "ppl=1.5x", "-q").stdout
        shown[columns] = "".join(page.replace("\\\n", " ").split())
        for line in page.splitlines() if columns else []:
            # a path that is wider than the terminal has a line of its own
            assert len(line) <= columns or len(line.rstrip("\\").split()) <= 2, line
    assert "recommended:" in shown[80] and "recommended:" in shown[None]
    # of a column that stands below its row, the title is left out
    assert sorted(shown[80] + "outcome") == sorted(shown[120]) == sorted(shown[None])
