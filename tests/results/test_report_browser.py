"""The report in a real browser (`make test-browser`): it works, and it stays on this machine."""

import itertools
import json
import re
import shutil
from importlib import resources
from pathlib import Path

import pytest

from prunebench.results.columns import duration
from prunebench.results.published import PublishedValue
from prunebench.results.report.data import build_report
from prunebench.results.report.page import render_page
from prunebench.results.schema import Result
from prunebench.results.store import ResultStore
from tests.factories import counted
from tests.report_pages import EVIL, generated, mixed, with_training

pytestmark = pytest.mark.browser
WIKI = "wikitext2-raw/test/2048/v1"


def open_browser():
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    binary = shutil.which("chromium") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if not binary or not chromedriver:
        pytest.fail("no browser: apt-get install chromium chromium-driver", pytrace=False)
    options = Options()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=Service(chromedriver))


@pytest.fixture(scope="module")
def chromium():
    driver = open_browser()
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page with an evil name, written as the command writes it."""
    from typer.testing import CliRunner

    from prunebench.cli import app

    folder = tmp_path_factory.mktemp("report")
    store = ResultStore(folder / "results")
    for result in [*mixed(), generated(EVIL, "sparsegpt"), generated(EVIL)]:
        store.publish(result)
    arguments = ["report", "-o", folder / "report.html", "--results-dir", folder / "results"]
    outcome = CliRunner().invoke(app, list(map(str, arguments)))
    assert outcome.exit_code == 0, outcome.output
    return folder / "report.html"


@pytest.fixture
def browser(chromium, page):
    """The page, freshly opened, wide and light; afterwards its console has to be empty."""
    show(chromium)
    visit(chromium, page)
    choose(chromium, "model", "m")
    yield chromium
    assert chromium.get_log("browser") == []


def visit(driver, page):
    driver.get("about:blank")
    driver.get_log("browser")
    driver.get_log("performance")
    driver.get(page.as_uri())


def show(driver, *, width=1280, scheme="light"):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


def wait_for(condition):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(None, 10).until(lambda _: condition())


def choose(driver, name, text):
    from selenium.webdriver.support.ui import Select

    Select(driver.find_element("id", name)).select_by_visible_text(text)


def chip(driver, text):
    """Press the switch with a text."""
    labels = driver.find_elements("css selector", "label.chip")
    (label,) = [one for one in labels if one.text.strip() == text]
    label.click()


def texts_of(driver, selector):
    script = "return [...document.querySelectorAll(arguments[0])].map((one) => one.textContent)"
    return driver.execute_script(script, selector)


def column(driver, number):
    return texts_of(driver, f"#table tbody tr > :nth-child({number})")


def drawn(driver, figure):
    """The texts of a chart, once it is drawn."""
    driver.execute_script("document.getElementById(arguments[0]).scrollIntoView()", figure)
    return wait_for(lambda: texts_of(driver, f"#{figure} svg text"))


def test_completions_are_marked_and_follow_the_filters(chromium, tmp_path):
    results = [generated(method=method, sparsity="2:4") for method in ("wanda", "sparsegpt")]
    row = {
        "prompt": "Once", "text": f" upon {EVIL}", "dense_text": " upon a time", "tokens": 9,
        "dense_tokens": 3, "same_tokens": 1,
    }  # fmt: skip
    block = {"prompts": "v1", "max_new_tokens": 48, "completions": [row]}
    rows = [Result.model_validate({**r.model_dump(), "completions": block}) for r in results]
    path = tmp_path / "texts.html"
    path.write_text(render_page(build_report(rows)), encoding="utf-8")
    show(chromium)
    visit(chromium, path)
    assert texts_of(chromium, "#text-list h3") == ["Once"]
    assert sorted(texts_of(chromium, ".texts dt")) == ["dense", "sparsegpt 2:4", "wanda 2:4"]
    assert texts_of(chromium, ".texts mark") == [EVIL, EVIL]
    chip(chromium, "wanda")
    assert texts_of(chromium, ".texts dt") == ["dense", "wanda 2:4"]
    assert chromium.get_log("browser") == []


def test_no_request_leaves_the_machine(browser, page):
    browser.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    for figure in ("trade-off", "lines", "layer-loss", "cost-0-seconds"):
        drawn(browser, figure)
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    }
    assert page.as_uri() in urls, "the log works"
    assert {url for url in urls if not url.startswith("data:")} == {page.as_uri()}
    script = "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    assert [name for name in browser.execute_script(script) if not name.startswith("data:")] == []


def test_the_table_sorts_by_mouse_and_keyboard(browser):
    from selenium.webdriver.common.keys import Keys

    headings = browser.find_elements("css selector", "#table thead th")
    (place,) = [i for i, h in enumerate(headings) if h.text.startswith("ppl ")]

    def perplexities():
        return [float(re.search(r"[\d.]+", text)[0]) for text in column(browser, place + 1)]

    before = perplexities()
    headings[place].click()
    wait_for(lambda: headings[place].get_attribute("aria-sort") == "ascending")
    assert perplexities() == sorted(before) != before
    button = headings[place].find_element("css selector", "[tabindex='0']")
    button.send_keys(Keys.ENTER)
    wait_for(lambda: headings[place].get_attribute("aria-sort") == "descending")
    assert perplexities() == sorted(before, reverse=True)
    headings[0].click()
    wait_for(lambda: headings[0].get_attribute("aria-sort") == "ascending")
    methods = [text.split()[0] for text in column(browser, 1)]
    assert methods == sorted(methods)


def test_missing_values_stay_last(browser):
    (seeds,) = [
        h for h in browser.find_elements("css selector", "#table thead th") if h.text == "seeds"
    ]
    for order in ("ascending", "descending"):
        seeds.click()
        wait_for(lambda order=order: seeds.get_attribute("aria-sort") == order)
        assert column(browser, 1)[-1] == "dense"  # it has no seeds


def test_filters_act_on_the_table_and_the_charts_together(browser):
    assert any("sparsegpt" in text for text in drawn(browser, "lines"))
    browser.execute_script("scrollTo(0, 0)")
    chip(browser, "wanda")
    chip(browser, "2:4")
    assert column(browser, 1) == ["dense", "wanda"]
    labels = wait_for(lambda: [t for t in drawn(browser, "lines") if " wanda" in t])
    wait_for(lambda: not any("sparsegpt" in text for text in drawn(browser, "lines")))
    assert labels == ["2:4 wanda"]
    assert "sparsegpt" not in drawn(browser, "trade-off")
    assert "sparsegpt" not in " ".join(drawn(browser, "cost-0-seconds"))
    assert "1 of 7 rows" in browser.find_element("id", "status").text
    shown = "return [...document.querySelectorAll('.provenance')].filter((one) => !one.hidden)"
    assert len(browser.execute_script(shown)) == 2
    browser.execute_script("scrollTo(0, 0)")
    browser.find_element("css selector", "button[type=reset]").click()
    assert len(column(browser, 1)) == 8


def test_the_search_box_narrows_the_table(browser):
    browser.find_element("css selector", "input[type=search]").send_keys("owl")
    wait_for(lambda: column(browser, 1) == ["sparsegpt owl"])


def test_another_score_changes_the_table_and_the_charts(browser):
    titles = texts_of(browser, "#column option")
    (accuracy,) = [title for title in titles if title == "acc piqa"]
    choose(browser, "column", accuracy)
    heading = browser.find_element("css selector", "#table thead th:nth-child(3)")
    assert heading.text.replace("\n", " ").startswith("acc piqa")
    assert heading.get_attribute("title").startswith("acc lm-eval/piqa/")
    assert re.fullmatch(r"\d\d\.\d% ± \d\.\d.*", column(browser, 3)[1])
    wait_for(lambda: "acc; higher is better" in drawn(browser, "lines"))
    assert accuracy in browser.find_element("css selector", "#trade-off strong").text


def test_all_settings_show_every_column(browser):
    before = len(browser.find_elements("css selector", "#table thead th"))
    (switch,) = [t for t in texts_of(browser, "label.chip") if "settings" in t]
    chip(browser, switch.strip())
    after = len(browser.find_elements("css selector", "#table thead th"))
    assert after == before + len(texts_of(browser, "#column option")) - 1


def test_bytes_and_published_values_where_they_are_known(chromium, tmp_path):
    from tests.results.test_report import bench_of

    results = [counted(result) for result in mixed()]
    values = [PublishedValue("wanda", "m", "0.6", "token_ppl", WIKI, 33.3, "T 2")]
    benches = {result.id: bench_of(result) for result in results}
    report = build_report(
        [*results, with_training(0, [250.0, 125.0])], benches=benches, published=values
    )
    (tmp_path / "page.html").write_text(render_page(report), "utf-8")
    show(chromium)
    visit(chromium, tmp_path / "page.html")
    choose(chromium, "column", "ppl wikitext2@2048")
    assert "bytes, of the dense model's in 16 bits" not in drawn(chromium, "trade-off")
    chip(chromium, "bytes, of the dense model's in 16 bits")
    wait_for(lambda: "bytes, of the dense model's in 16 bits" in drawn(chromium, "trade-off"))
    assert "0.560 (2:4)" in " ".join(texts_of(chromium, "#table tbody td"))
    assert "1.40 x" in " ".join(texts_of(chromium, "#table tbody td"))
    assert "0.6 wanda, published" in drawn(chromium, "published-chart")
    assert "T 2" in " ".join(texts_of(chromium, ".twins td"))
    assert "tokens learned from" in drawn(chromium, "curves")
    assert not chromium.find_element("id", "model").is_displayed()  # there is a single one
    assert chromium.get_log("browser") == []


def test_the_heat_map_is_drawn_and_follows_the_choice(browser):
    def fills(figure):
        drawn(browser, figure)
        script = (
            "return [...document.querySelectorAll(arguments[0])].map((p) => p.getAttribute('fill'))"
        )
        selector = f"#{figure} .mark-rect.layer_1_marks path"
        return wait_for(lambda: browser.execute_script(script, selector))

    names = texts_of(browser, "#run option")
    assert "sparsegpt 0.6 (owl)" in names
    choose(browser, "run", names[0])
    wait_for(lambda: len(set(fills("layer-sparsity"))) == 1)
    loss = fills("layer-loss")
    assert len(loss) == 7 * 3 and len(set(loss)) > 5
    choose(browser, "run", "sparsegpt 0.6 (owl)")
    # the two ends of the scale: blocks that are spared and blocks that are pruned more
    wait_for(lambda: len(set(fills("layer-sparsity"))) == 2)
    spared, pruned = sorted(map(luminance, set(fills("layer-sparsity"))))
    assert spared < 0.05 < 0.6 < pruned
    assert fills("layer-loss") != loss
    title = browser.find_element("css selector", "#layer-sparsity strong").text
    assert title == "Realised sparsity: sparsegpt 0.6 (owl)"


def test_there_is_a_table_behind_every_chart(browser):
    for figure in ("trade-off", "lines", "layer-sparsity", "layer-loss", "cost-0-seconds"):
        script = "document.querySelector(arguments[0]).open = true"
        browser.execute_script(script, f"#{figure} details.data")
        rows = wait_for(lambda figure=figure: texts_of(browser, f"#{figure} details.data tbody tr"))
        assert len(rows) > 5
    (first,) = {texts_of(browser, "#lines details.data tbody th")[0]}
    assert first == "dense"


def commands(driver):
    driver.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    return wait_for(lambda: driver.find_elements("css selector", ".command"))


def pasted(driver):
    """What the clipboard holds, by pasting it."""
    from selenium.webdriver.common.keys import Keys

    driver.execute_script("document.body.append(document.createElement('textarea'))")
    area = driver.find_element("css selector", "textarea")
    area.send_keys(Keys.CONTROL, "v")
    return area.get_property("value")


@pytest.mark.parametrize(
    "clipboard", ["", "Object.defineProperty(navigator, 'clipboard', {value: undefined});"]
)
def test_the_button_copies_the_command(browser, clipboard):
    command = commands(browser)[3]
    text = command.find_element("css selector", "code").text
    assert text.startswith("prunebench run -m")
    browser.execute_script(clipboard)
    command.find_element("css selector", "button").click()
    status = browser.find_element("id", "copied")
    wait_for(lambda: status.get_property("textContent"))
    assert status.get_property("textContent") == "Copied"
    assert pasted(browser) == text


def test_where_nothing_can_copy_the_command_is_selected(browser):
    command = commands(browser)[2]
    browser.execute_script(
        "Object.defineProperty(navigator, 'clipboard', {value: undefined});"
        "document.execCommand = () => false;"
    )
    button = command.find_element("css selector", "button")
    button.click()
    wait_for(lambda: "Ctrl+C" in button.text)
    selected = browser.execute_script("return window.getSelection().toString()")
    assert selected == command.find_element("css selector", "code").text


@pytest.mark.parametrize("policy", ["kept", "removed"])
def test_a_name_with_html_is_shown_and_not_run(browser, page, tmp_path, policy):
    from selenium.common.exceptions import NoAlertPresentException

    if policy == "removed":  # the escaping has to hold without the second line of defence
        html = page.read_text("utf-8")
        bare = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
        assert bare != html
        (tmp_path / "bare.html").write_text(bare, "utf-8")
        browser.get((tmp_path / "bare.html").as_uri())
    choose(browser, "model", EVIL)
    commands(browser)
    drawn(browser, "lines")
    with pytest.raises(NoAlertPresentException):
        _ = browser.switch_to.alert
    assert EVIL in " ".join(texts_of(browser, "#table caption"))
    assert browser.find_elements("css selector", "img") == []


def test_a_phone_scrolls_only_downwards(browser):
    show(browser, width=390)
    commands(browser)
    for figure in ("trade-off", "lines", "layer-loss", "cost-0-seconds"):
        drawn(browser, figure)
    script = "return [document.documentElement.scrollWidth, document.body.scrollWidth]"
    assert max(browser.execute_script(script)) <= 390
    script = """return [...document.querySelectorAll("main *, form *")].filter((one) =>
        one.getBoundingClientRect().right > 391 && !one.closest(".wide, .plot, .hidden")
    ).map((one) => one.outerHTML.slice(0, 80))"""
    assert browser.execute_script(script) == []
    wide = browser.find_element("css selector", "#first .wide")
    assert wide.get_property("scrollWidth") > wide.get_property("clientWidth")
    script = """return [...document.querySelectorAll(".plot svg")].filter((one) =>
        one.clientWidth > one.closest(".plot").clientWidth + 1).length"""
    assert browser.execute_script(script) == 0


def outside(driver):
    """The texts of charts that are cut, because they stand over the edge."""
    script = """return [...document.querySelectorAll(".plot svg text")].filter((one) => {
        const text = one.getBoundingClientRect(), all = one.closest("svg").getBoundingClientRect();
        return text.width && (text.left < all.left - 1 || text.right > all.right + 1);
    }).map((one) => one.textContent)"""
    return driver.execute_script(script)


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """The page of the committed results."""
    results = ResultStore(Path(__file__).parents[2] / "results").read()[0]
    page = tmp_path_factory.mktemp("committed") / "page.html"
    page.write_text(render_page(build_report(results)), "utf-8")
    return page


def test_a_phone_that_is_turned_has_the_whole_legend(chromium, committed):
    show(chromium, width=844)
    visit(chromium, committed)
    assert "sparsegpt 0.6" in drawn(chromium, "trade-off")
    show(chromium, width=390)
    wait_for(lambda: "sparsegpt 0.6" not in drawn(chromium, "trade-off"))  # no room for names
    assert {"maskllm", "wanda"} <= set(drawn(chromium, "trade-off"))
    assert outside(chromium) == []


def places(driver, selector):
    script = """return [...document.querySelectorAll(arguments[0])].map((one) => {
        const { x, y, width, height } = one.getBoundingClientRect();
        return { text: one.textContent, x, y, width, height };
    })"""
    return driver.execute_script(script, selector)


@pytest.mark.parametrize("width", [520, 900, 1280])
def test_names_in_a_chart_do_not_overlap(chromium, committed, width):
    show(chromium, width=width)
    visit(chromium, committed)
    drawn(chromium, "trade-off")
    texts = places(chromium, "#trade-off svg .mark-text text")
    names = [one for one in texts if re.fullmatch(r"(?!dense)[a-z+ ]+ [\d.:]+", one["text"])]
    # the best of each sparsity, whichever method that is
    assert {"0.6", "0.8", "2:4"} <= {one["text"].rpartition(" ")[2] for one in names}
    for one, other in itertools.combinations(names, 2):
        apart = (
            one["x"] + one["width"] <= other["x"] or other["x"] + other["width"] <= one["x"]
            or one["y"] + one["height"] <= other["y"] or other["y"] + other["height"] <= one["y"]
        )  # fmt: skip
        assert apart, (one, other)
    assert outside(chromium) == []


def test_times_are_written_as_compare_writes_them(chromium):
    source = resources.files("prunebench.results.report").joinpath("page.js").read_text("utf-8")
    function = re.search(r"^function duration.*?^}", source, re.M | re.S)[0]
    times = [
        0.0,
        0.04,
        0.85,
        0.96,
        1.2,
        31.0,
        59.96,
        59.98,
        76.0,
        200.0,
        593.0,
        2011.0,
        3599.0,
        2e5,
    ]
    texts = chromium.execute_script(f"{function} return arguments[0].map(duration)", times)
    assert texts == [duration(seconds) for seconds in times]


def luminance(colour):
    channels = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_dark_is_dark_and_both_are_legible(browser):
    backs = {}
    drawn(browser, "lines")
    for scheme in ("light", "dark"):
        show(browser, scheme=scheme)
        script = """const of = (s, p) => getComputedStyle(document.querySelector(s))[p];
            return [of("html", "backgroundColor"), of("td", "color"), of("figcaption", "color"),
                    of("tbody a", "color"), of("#lines svg .role-axis-label text", "fill")]"""
        back = browser.execute_script(script)[0]
        backs[scheme] = luminance(back)

        def legible(back=back, script=script):  # the charts are drawn anew in a moment
            pairs = [sorted(map(luminance, (back, t))) for t in browser.execute_script(script)[1:]]
            return all((light + 0.05) / (dark + 0.05) >= 4.5 for dark, light in pairs)  # WCAG AA

        wait_for(legible)
    assert backs["dark"] < 0.05 < 0.9 < backs["light"]


def test_a_link_opens_its_provenance(browser):
    link = browser.find_elements("css selector", "#table tbody a")[2]
    target = browser.find_element("id", link.get_attribute("href").rpartition("#")[2])
    assert target.get_attribute("open") is None
    link.click()
    wait_for(lambda: target.get_attribute("open"))
    assert target.is_displayed()
    wait_for(lambda: target.find_elements("css selector", ".command"))


def test_everything_has_a_name_for_a_screen_reader(browser):
    browser.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    for figure in ("trade-off", "lines", "layer-loss", "cost-0-seconds"):
        drawn(browser, figure)
    tree = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named = (
        "button",
        "link",
        "image",
        "combobox",
        "region",
        "table",
        "search",
        "searchbox",
        "checkbox",
    )
    nameless = [
        node["role"]["value"]
        for node in tree
        if node.get("role", {}).get("value") in named
        and not node.get("ignored")
        and not node.get("name", {}).get("value")
    ]
    assert nameless == []
    roles = {node.get("role", {}).get("value") for node in tree}
    assert {"banner", "main", "contentinfo", "search", "heading", "table", "checkbox"} <= roles
    script = """return [...document.querySelectorAll(".plot svg, .plot [aria-roledescription]")]
        .map((one) => one.closest("[aria-label]")?.getAttribute("aria-label") ?? "")"""
    charts = [label for label in browser.execute_script(script) if "are in the table" in label]
    assert len(charts) >= 4
