"""The charts of the report: their specifications are valid, and draw what the rows say."""

import itertools
import re
import xml.etree.ElementTree as ElementTree

import altair
import pytest
import vl_convert

from prunebench.results.report import charts, libraries
from prunebench.results.report.data import build_report
from prunebench.results.report.figures import figures_of
from prunebench.results.report.specification import fill
from prunebench.results.report.theme import DARK, LIGHT, SHAPES, vega_config
from tests.factories import make_result
from tests.report_pages import EVIL, generated, mixed, with_training

METHODS = ("alps", "wanda")


def row(method, zeros, value, **more):
    fields = {"id": f"{method}{zeros}", "method": method, "zeros": zeros, "shown": value}
    fields |= {"name": method, "line": method, "series": method, "text": f"{value}", "order": 0}
    return fields | {"sparsity": f"{zeros}"} | more


def trade_off(rows, published=(), **how):
    how = {"against": "zeros", "log": True, "higher_is_better": False} | how
    spec = charts.trade_off("token_ppl", METHODS, **how)
    return vl_convert.vegalite_to_svg(fill(spec, {"rows": rows, "published": published}))


def all_specs():
    for against, log in itertools.product(charts.X_AXES, (True, False)):
        yield charts.trade_off("acc", METHODS, against=against, log=log, higher_is_better=not log)
    for log, bars in ((True, False), (False, True), (False, False)):
        yield charts.lines("title", METHODS, log=log, bars=bars, number_format="~g")
    yield charts.layer_map("zeros", log=False, number_format=".1%")
    yield charts.layer_map("loss", log=True, number_format=".3~g")
    yield charts.learning_curves()


@pytest.mark.parametrize("spec", list(all_specs()), ids=lambda _: "")
def test_a_specification_is_valid_vega_lite(spec):
    # raises SchemaValidationError where it is not
    altair.Chart.from_dict({**spec, "datasets": {"rows": [], "published": []}})


def path_of(svg, color):
    """The corners of the one line of a color."""
    (path,) = re.findall(rf'd="(M[^"]*)"[^>]*stroke="{color}"', svg)
    return [tuple(map(float, corner.split(","))) for corner in re.split("[ML]", path) if corner]


def test_the_pareto_front_by_hand():
    rows = [
        row("dense", 0.0, 20.0), row("a", 0.5, 40.0), row("b", 0.5, 41.0), row("c", 0.4, 45.0),
        row("d", 0.6, 60.0), row("e", 0.3, 41.0), row("f", 0.2, 30.0),
        row("g", 0.9, 2000.0, beyond=True),
    ]  # fmt: skip
    front = path_of(trade_off(rows), LIGHT["front"])
    across = [x for x, _ in front]
    start, end = across[0], across[-1]
    # dense, f, a and d: what lies beyond the scale has no place on it
    assert [0.6 * (x - start) / (end - start) for x in across] == pytest.approx(
        [0, 0.2, 0.5, 0.6], rel=1e-4
    )
    down = [y for _, y in front]
    assert down == sorted(down, reverse=True)


def test_the_front_of_accuracies_and_of_bytes_turn_around():
    rows = [row("a", 0.5, 0.6, size=0.6), row("b", 0.5, 0.5, size=0.5), row("c", 0.6, 0.4)]
    rows[2]["size"] = 0.7  # more bytes and worse
    svg = trade_off(rows, against="size", log=False, higher_is_better=True)
    assert len(path_of(svg, LIGHT["front"])) == 2
    svg = trade_off(rows, log=False, higher_is_better=True)
    assert len(path_of(svg, LIGHT["front"])) == 2  # a and c: b is beaten at the same zeros


def points_of(svg, *, filled):
    """Where the points stand, in pixels."""
    paths = re.findall(
        r'<path transform="translate\(([\d.]+),([\d.]+)\)" d="M[^>]*stroke=[^>]*>', svg
    )
    whole = re.findall(r'<path transform="translate[^>]*stroke=[^>]*>', svg)
    assert len(paths) == len(whole)
    return [
        tuple(map(float, place))
        for place, path in zip(paths, whole, strict=True)
        if ("fill=" in path) == filled
    ]


def test_points_that_would_hide_each_other_stand_side_by_side():
    rows = [row("dense", 0.0, 20.0), row("wanda", 0.7, 200.0)]
    rows += [row("alps", 0.5, 40.0), row("wanda", 0.5, 40.2), row("alps", 0.5, 40.1, pattern=True)]
    groups = re.findall(r'<g class="mark-symbol role-mark.*?</g>', trade_off(rows))
    points = [place for group in groups for place in points_of(group, filled=True)]
    beside = sorted(x for x, y in points if y > min(y for _, y in points) + 50)
    assert (len(points), len(beside)) == (4, 3)
    assert [b - a for a, b in itertools.pairwise(beside)] == pytest.approx([10, 10])


def test_published_values_are_hollow():
    ours, theirs = row("wanda", 0.5, 40.0), row("wanda", 0.6, 50.0, hollow=True, source="T")
    groups = re.findall(r'<g class="mark-symbol role-mark.*?</g>', trade_off([ours], [theirs]))
    assert [len(points_of(group, filled=False)) for group in groups] == [1, 0]
    assert [len(points_of(group, filled=True)) for group in groups] == [0, 1]


def test_a_line_has_its_label_and_its_value():
    rows = [row("wanda", 0.5, 40.0, line="0.5 wanda", text="40.00 ± 1.00", low=39.0, high=41.0)]
    rows.append(row("dense", 0.0, 20.0, line="dense", text="dense 20.00"))
    spec = charts.lines("perplexity", METHODS, log=True, number_format="~g")
    svg = vl_convert.vegalite_to_svg(fill(spec, {"rows": rows}, title="ppl"))
    texts = re.findall(r">([^<>]+)</text>", svg)
    assert {"0.5 wanda", "40.00 ± 1.00", "dense 20.00", "perplexity", "ppl"} <= set(texts)
    assert "dense" not in texts  # it is a line across, and no row


def test_every_method_has_its_color_and_its_shape():
    for colors in (LIGHT, DARK):
        assert len({colors[f"s{i}"] for i in range(8)}) == 8
    assert len(set(SHAPES)) == 8
    assert vega_config("dark")["range"]["category"][0] == DARK["s0"]


def luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colors", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("name", ["ink", "muted", *(f"s{i}" for i in range(8))])
def test_colors_are_legible(colors, name):
    light, dark = sorted(map(luminance, (colors[name], colors["back"])), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG AA


@pytest.mark.slow
def test_a_figure_stands_alone_and_has_no_gap_in_its_numbers():
    rows = [make_result(method="a", value=float("inf")), make_result(method="b", value=30.0)]
    figures, _ = figures_of(build_report([*rows, generated(f"{EVIL}$x_1$\0")]))
    for figure in figures:
        svg = vl_convert.vegalite_to_svg(figure.spec)
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        assert "NaN" not in svg and "var(--" not in svg


def test_figures_of_models_with_one_slug_do_not_meet():
    named, _ = figures_of(build_report([generated("a/b"), generated("a-b")]))
    names = [figure.name for figure in named]
    assert len(names) == len(set(names))
    assert any(name.endswith("-2") for name in names)


def test_the_figures_of_a_report():
    figures, left_out = figures_of(build_report([*mixed(), with_training(0, [250.0, 125.0])]))
    names = {figure.name for figure in figures}
    wiki = "m-token_ppl-wikitext2-raw-test-2048-v1"
    assert {f"{wiki}-against-zeros", f"{wiki}-by-method", "m-learning-curves"} <= names
    assert {"m-prune-time-1", "m-peak-memory-of-the-host-1", "m-peak-memory-of-the-gpu-1"} <= names
    assert {"m-prune-time-0", "m-peak-memory-of-the-host-0"} <= names  # another machine
    assert any(name.endswith("-layer-loss") for name in names)
    assert left_out == 0


def test_a_library_cannot_leave_its_script():
    text = libraries._inline('a = "</script>"; b = /<\\/SCRIPT>/; c = "</Script"; d = "<!--"')
    assert not re.search(r"</script|<!--", text, re.IGNORECASE)
    for script in (libraries.charts_script(), libraries.table_script()):
        assert not re.search(r"</script|<!--", script, re.IGNORECASE)
        assert "window." in script


def test_another_itables_is_named(monkeypatch, tmp_path):
    from types import SimpleNamespace

    from prunebench.errors import MissingResource

    (tmp_path / "html").mkdir()
    (tmp_path / "html" / "dt_bundle.js").write_text("nothing")
    found = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    libraries.table_script.cache_clear()
    monkeypatch.setattr(libraries.importlib.util, "find_spec", lambda name: found)
    with pytest.raises(MissingResource, match="itables"):
        libraries.table_script()
    libraries.table_script.cache_clear()
