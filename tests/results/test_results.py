"""Result files: complete, immutable, many writers; the committed ones are sound and fresh."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from prunebench.errors import MissingResource, SaveError
from prunebench.results.compare import compare
from prunebench.results.schema import LayerSparsity, Result, json_schema
from prunebench.results.selection import Selection
from prunebench.results.store import Damaged, ResultStore, read_result
from tests.factories import make_result

REPOSITORY = Path(__file__).parents[2]


def test_round_trip_and_place(tmp_path):
    store, result = ResultStore(tmp_path), make_result(sparsity="2:4", model="org/name")
    path = store.publish(result)
    assert path.parent == tmp_path / "org-name" / "wanda-2of4"
    results, damaged = store.read()
    assert (results, damaged) == ([result], [])
    assert json.loads(path.read_text())["cost"]["peak_gpu_bytes"] is None


def test_layers_can_be_let_go_of_and_are_checked_where_they_are_read(tmp_path):
    result = make_result()
    layer = {"name": "l", "out_features": 1, "in_features": 2, "requested": "0.5", "zeros": 1}
    document = json.loads(result.to_json())
    document["sparsity"]["layers"] = [layer]
    path = ResultStore(tmp_path).publish(Result(**document))
    ((slim,), _) = ResultStore(tmp_path).read(layers=False)
    assert slim == result
    assert len(ResultStore(tmp_path).read()[0][0].sparsity.layers) == 1
    path.write_text(path.read_text().replace('"zeros": 1', '"zeros": "many"'))
    _, (damaged,) = ResultStore(tmp_path).read()
    assert "sparsity.layers.0.zeros" in damaged.reason


def test_a_result_is_never_overwritten(tmp_path):
    store, result = ResultStore(tmp_path), make_result()
    store.publish(result)
    with pytest.raises(SaveError, match="exists already"):
        store.publish(result)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda d: "{", "not a JSON object"),
        (lambda d: "[]", "not a JSON object"),
        (lambda d: json.dumps({**d, "schema_version": 99}), "schema version 99"),
        (lambda d: json.dumps({**d, "schema_version": 2, "new": 1}), "a newer prunebench"),
        (lambda d: json.dumps({k: v for k, v in d.items() if k != "schema_version"}), "None"),
        (lambda d: json.dumps({**d, "id": "other"}), "not its file name"),
        (lambda d: json.dumps({**d, "spec": {**d["spec"], "seed": 7}}), "spec_id does not follow"),
        (lambda d: json.dumps({**d, "extra": 1}), "extra"),
        (lambda d: json.dumps({**d, "created_at": "yesterday"}), "created_at: "),
        (lambda d: json.dumps({**d, "created_at": "20260101"}), "not a time such as 2026-01-31T"),
        (lambda d: json.dumps({k: v for k, v in d.items() if k != "hardware"}), "hardware"),
    ],
)
def test_damage_is_named(tmp_path, damage, says):
    path = ResultStore(tmp_path).publish(make_result())
    document = json.loads(path.read_text())
    path.write_text(damage(document))
    outcome = read_result(path)
    assert isinstance(outcome, Damaged)
    assert says in outcome.reason


def test_no_table_is_written_where_a_result_is_damaged(cli, tmp_path):
    store = ResultStore(tmp_path / "results")
    store.publish(make_result())
    damaged = store.publish(make_result(seed=1))
    damaged.write_text("{")
    run = cli("results", "table", "--results-dir", store.root, code=4)
    assert f"{damaged} is damaged: not a JSON object" in run.stderr
    assert "1 of 2 files are damaged" in run.stderr
    assert not (store.root / "TABLE.md").exists()
    damaged.unlink()
    cli("results", "table", "--results-dir", store.root)
    assert (store.root / "TABLE.md").exists()


def test_a_time_that_is_none_is_damage_and_no_traceback(cli, tmp_path):
    path = ResultStore(tmp_path / "results").publish(make_result())
    path.write_text(path.read_text().replace("2026-01-01", "yesterday"))
    run = cli("compare", "--results-dir", tmp_path / "results", code=3)
    assert f"{path} is skipped: created_at: " in run.stderr


def test_no_folder():
    with pytest.raises(MissingResource, match="no results folder"):
        ResultStore(Path("/nonexistent")).read()


@pytest.mark.slow
def test_fifty_processes_at_once_lose_nothing(tmp_path):
    script = tmp_path / "writer.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        from pathlib import Path
        from prunebench.results.store import ResultStore, read_result, new_run_id
        template = read_result(Path({str(tmp_path / "template")!r}) / sys.argv[1])
        store = ResultStore(Path({str(tmp_path / "all")!r}))
        for _ in range(4):
            store.publish(template.model_copy(update={{"id": new_run_id(template.spec)}}))
        """)
    )
    path = ResultStore(tmp_path / "template").publish(make_result())
    name = str(path.relative_to(tmp_path / "template"))
    processes = [subprocess.Popen([sys.executable, str(script), name]) for _ in range(50)]
    assert [p.wait(timeout=120) for p in processes] == [0] * 50
    results, damaged = ResultStore(tmp_path / "all").read()
    assert len(results) == 200
    assert damaged == []
    assert not list((tmp_path / "all").rglob(".*"))


def test_the_committed_schema_is_the_code_s():
    committed = REPOSITORY / "prunebench" / "results" / "result.schema.json"
    assert committed.read_text("utf-8") == json_schema()


def committed_results() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "results/*.json"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0:
        return [REPOSITORY / name for name in listed.stdout.split()]
    return sorted((REPOSITORY / "results").rglob("*.json"))


def test_committed_results_are_sound():
    paths = committed_results()
    assert paths, "the repository ships measured rows"
    results, damaged = ResultStore(REPOSITORY / "results").read(paths)
    assert damaged == []
    for path, result in zip(sorted(paths), results, strict=True):
        assert path == ResultStore(REPOSITORY / "results").path_of(result)
        assert result.status == "ok"
        assert result.sparsity.pattern_violations == 0
        # what 4 bits hold as a zero with a sign (Gemma) is left by `dense` alone
        assert result.sparsity.negative_zeros == 0 or result.spec.method == "dense"
        assert "/work/" not in path.read_text("utf-8")


def test_a_table_needs_no_layers(tmp_path):
    """They are cut out of the text before it is parsed; all else is the same."""
    store = ResultStore(tmp_path)
    result = make_result()
    shape = {"out_features": 8, "in_features": 8, "requested": "0.5", "zeros": 32}
    layers = [LayerSparsity(name='blocks[0]."x", ]', **shape)]
    odd = result.sparsity.model_copy(update={"layers": layers})
    plain = [LayerSparsity(name=name, **shape) for name in "ab"]
    usual = result.sparsity.model_copy(update={"layers": plain})
    store.publish(result.model_copy(update={"sparsity": usual}))
    store.publish(result.model_copy(update={"id": "0" * 8 + "-odd", "sparsity": odd}))
    whole, cut = (store.read(layers=how)[0] for how in (True, False))
    assert sorted(len(full.sparsity.layers) for full in whole) == [1, 2]
    assert sorted((full.sparsity.layers for full in cut), key=len) == [[], layers]
    for full, light in zip(whole, cut, strict=True):
        same = full.sparsity.model_copy(update={"layers": light.sparsity.layers})
        assert full.model_copy(update={"sparsity": same}) == light


def test_the_table_is_fresh():
    from prunebench.cli.results import table_text

    results, _ = ResultStore(REPOSITORY / "results").read(committed_results())
    table = (REPOSITORY / "results" / "TABLE.md").read_text("utf-8")
    assert table == table_text(results), "run prunebench results table"


PROTOCOL = "wiki-sample/held-out/512/v1"


def committed_cells(sparsity, **settings):
    """Values over the seeds of the committed rows, by method and allocation."""
    results, _ = ResultStore(REPOSITORY / "results").read(committed_results())
    selection = Selection.parse(
        [f"sparsity=0,{sparsity}", "model=smollm2-135m-q4", "within_block=joint,None",
         "calibration=c4-sample/rest,None", "metric=token_ppl", f"protocol={PROTOCOL}",
         *(f"{key}={value}" for key, value in settings.items())]
    )  # fmt: skip
    (table,) = compare(results, selection)
    return {
        (cell.method, cell.settings["allocation"] or "uniform"): next(iter(cell.scores.values()))
        for cell in table.cells
    }


@pytest.mark.parametrize(
    ("sparsity", "order"),
    [
        ("2:4", "dense alps sparsegpt wanda magnitude random"),
        ("2:4", "dense alps sparsegpt gblm magnitude random"),
        ("0.5", "dense alps wanda magnitude random"),
        ("0.5", "dense alps gblm magnitude random"),
        ("0.5", "dense alps sparsegpt magnitude random"),
    ],
)
def test_the_committed_rows_rank_as_the_papers_do(sparsity, order):
    """Beyond the noise: the worst seed of one is better than the best seed of the next.

    SparseGPT and Wanda at 50% are in no order here: with C4 for calibration and Wikipedia for
    evaluation the papers' order does not hold on this model; see the next but one.
    """
    cells = committed_cells(sparsity, allocation="uniform")
    order = order.split()
    for better, worse in zip(order, order[1:], strict=False):
        first, second = cells[better, "uniform"], cells[worse, "uniform"]
        assert max(first.values) < min(second.values), (better, worse)


@pytest.mark.parametrize(
    ("method", "allocation"), [("wanda", "owl"), ("wanda", "dlp"), ("sparsegpt", "sensitivity")]
)
def test_allocators_that_help_at_70_percent_do_so_beyond_the_noise(method, allocation):
    cells = committed_cells("0.7")
    allocated, uniform = cells[method, allocation], cells[method, "uniform"]
    assert allocated.seeds == uniform.seeds == 3
    assert max(allocated.values) < min(uniform.values)


def test_sparsegpt_beats_wanda_where_calibration_and_evaluation_are_of_one_kind():
    """Beyond the noise at 50%, on C4 and on Wikipedia; not from one to the other (README)."""
    results, _ = ResultStore(REPOSITORY / "results").read(committed_results())
    for kind in ("c4", "wiki"):
        selection = Selection.parse(
            ["sparsity=0.5", "allocation=uniform", "within_block=joint", "metric=token_ppl",
             f"calibration={kind}-sample/rest", f"protocol={kind}-sample/held-out/512/v1"]
        )  # fmt: skip
        (table,) = compare(results, selection)
        values = {cell.method: next(iter(cell.scores.values())).values for cell in table.cells}
        assert len(values["sparsegpt"]) == len(values["wanda"]) == 3
        assert max(values["sparsegpt"]) < min(values["wanda"])


def committed_layers(method, sparsity):
    """The layers of the newest committed row of each seed, as pruned."""
    results, _ = ResultStore(REPOSITORY / "results").read(committed_results())
    selected = (method, sparsity, "c4-sample/rest", "none", 32)
    rows = [
        r
        for r in sorted(results, key=lambda r: r.created_at)
        if (r.spec.method, r.spec.sparsity, r.spec.calibration, r.spec.recover,
            r.spec.calibration_samples) == selected and r.spec.model == "smollm2-135m-q4"
    ]  # fmt: skip
    return {r.spec.seed: {layer.name: layer for layer in r.sparsity.layers} for r in rows}


@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
def test_alps_loses_no_more_than_sparsegpt_in_nearly_all_layers(sparsity):
    """Each behind its own pruned blocks; on one Hessian it is the benchmark `alps-losses`.

    The exception is down_proj of block 11, which loses ten times as much as its neighbours.
    """
    ours, theirs = committed_layers("alps", sparsity), committed_layers("sparsegpt", sparsity)
    for seed in (0, 1, 2):
        worse = {n for n, layer in ours[seed].items() if layer.loss > theirs[seed][n].loss}
        assert len(ours[seed]) == 210
        assert worse <= {"model.layers.11.mlp.down_proj"}


@pytest.mark.parametrize("sparsity", ["0.6", "0.7", "0.8"])
def test_the_scheduler_ranks_layers_by_what_they_lose(sparsity):
    """Spearman's correlation of estimate and measured loss is above 0.9, as METHODS asks."""
    import pandas

    for layers in committed_layers("scheduler", sparsity).values():
        frame = pandas.DataFrame([(x.estimate, x.loss) for x in layers.values()])
        assert frame[0].rank().corr(frame[1].rank()) > 0.9
