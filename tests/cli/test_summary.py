"""Scores in the words of `run`, `bench` and `sweep`: short names, and the whole id behind them."""

from prunebench.cli.summary import full_protocol, short_title
from prunebench.cli.sweep import _told
from prunebench.sweep.cell import RecipeCell
from prunebench.sweep.sweep import CellOutcome
from tests.factories import make_result

WIKI = "wiki-sample/held-out/512/v1"


def test_a_score_has_a_short_title_and_its_id_where_that_is_another():
    (score,) = make_result(protocol=WIKI).scores
    assert (short_title(score), full_protocol(score)) == ("ppl wiki", f"  {WIKI}")
    (score,) = make_result(protocol="odd").scores
    assert (short_title(score), full_protocol(score)) == ("ppl odd", "")


def test_a_finished_cell_is_told_with_short_names():
    result = make_result(protocol=WIKI, value=40.0)
    cell = RecipeCell(1, {"method": "wanda"}, {"method": "wanda"})
    assert _told(CellOutcome(cell, "finished", result)).endswith(", ppl wiki 40.00")
