"""The report in a real browser (`make test-browser`): it works, and it stays on this machine."""

import json
import re
import shutil

import pytest

from prunebench.results.report.data import build_report
from prunebench.results.report.page import render_page
from prunebench.results.store import ResultStore
from tests.report_pages import EVIL, generated, mixed

pytestmark = pytest.mark.browser


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
    chromium.get("about:blank")
    chromium.get_log("browser")
    chromium.get_log("performance")
    chromium.get(page.as_uri())
    yield chromium
    assert chromium.get_log("browser") == []


def show(driver, *, width=1280, scheme="light"):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


def table_of(driver, model):
    (table,) = [
        element
        for element in driver.find_elements("css selector", "table.sortable")
        if element.find_element("css selector", "caption")
        .get_property("textContent")
        .endswith(model)
    ]
    return table


def column(table, index):
    cells = table.find_elements("css selector", f"tbody tr > :nth-child({index})")
    return [cell.get_property("textContent") for cell in cells]


def test_no_request_leaves_the_machine(browser, page):
    browser.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
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

    table = table_of(browser, " m")
    headings = table.find_elements("css selector", "thead th")
    titles = [heading.get_property("textContent") for heading in headings]
    (index,) = [i for i, title in enumerate(titles) if title.startswith("ppl wikitext2")]

    def perplexities():
        return [float(re.search(r"[\d,]*\.\d+", text)[0].replace(",", ""))
                for text in column(table, index + 1)]  # fmt: skip

    before = perplexities()
    button = headings[index].find_element("css selector", "button")
    button.click()
    assert headings[index].get_attribute("aria-sort") == "ascending"
    assert perplexities() == sorted(before) != before
    button.send_keys(Keys.ENTER)
    assert headings[index].get_attribute("aria-sort") == "descending"
    assert perplexities() == sorted(before, reverse=True)
    headings[0].find_element("css selector", "button").send_keys(Keys.SPACE)
    assert column(table, 1) == sorted(column(table, 1))
    assert headings[index].get_attribute("aria-sort") == "none"
    said = browser.find_elements("css selector", "[aria-live]")
    assert "Sorted by method, ascending" in [
        element.get_property("textContent") for element in said
    ]


def test_empty_cells_stay_last(browser):
    table = table_of(browser, " m")
    button = table.find_elements("css selector", "thead button")[-1]  # seeds: dense has none
    for _ in range(2):
        button.click()
        assert column(table, 1)[-1] == "dense"


def test_the_heat_map_is_drawn_and_follows_the_choice(browser):
    section = browser.find_elements("css selector", "section.heat")[-1]
    figures = section.find_elements("css selector", "figure[data-kind]")
    assert [figure.get_attribute("data-kind") for figure in figures] == ["ratio", "loss"]

    def fills(figure):
        boxes = figure.find_elements("css selector", "rect[data-key]")
        assert all(box.size["width"] > 1 and box.size["height"] > 1 for box in boxes)
        return [box.get_attribute("fill") for box in boxes]

    before = [fills(figure) for figure in figures]
    assert [len(cells) for cells in before] == [7 * 3, 7 * 3]
    assert len(set(before[0])) <= 2  # uniform, but for the rounding of the counts
    assert len(set(before[1])) > 5
    select = section.find_element("css selector", "select")
    names = [option.text for option in select.find_elements("css selector", "option")]
    assert names[0] == "sparsegpt 0.4 (uniform)"
    select.send_keys("sparsegpt 0.6 (owl)")
    after = [fills(figure) for figure in figures]
    assert {"#440154", "#fde725"} <= set(after[0])  # the whole range: spared and pruned more
    assert after[1] != before[1]
    title = figures[0].find_element("css selector", "rect[data-key] title")
    cell = figures[0].find_element("css selector", "td[data-key]")
    said = title.get_property("textContent")
    assert said == f"self_attn.q_proj, block 0: {cell.get_property('textContent')}"
    drawn = render_page(build_report([r for r in mixed() if r.spec.allocation == "owl"]))
    assert f"<title>{said}</title>" in drawn  # script and Python agree


def commands(driver):
    driver.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    return driver.find_elements("css selector", ".command")


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


def wait_for(condition):
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(None, 5).until(lambda _: condition())


@pytest.mark.parametrize("policy", ["kept", "removed"])
def test_a_name_with_html_is_shown_and_not_run(browser, page, tmp_path, policy):
    from selenium.common.exceptions import NoAlertPresentException

    if policy == "removed":  # the escaping has to hold without the second line of defence
        html = page.read_text("utf-8")
        bare = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
        assert bare != html
        (tmp_path / "bare.html").write_text(bare, "utf-8")
        browser.get((tmp_path / "bare.html").as_uri())
    with pytest.raises(NoAlertPresentException):
        _ = browser.switch_to.alert
    assert EVIL in [element.text for element in browser.find_elements("css selector", "h2")]
    assert browser.find_elements("css selector", "img") == []


def test_a_phone_scrolls_only_downwards(browser):
    show(browser, width=375)
    commands(browser)
    script = "return [document.documentElement.scrollWidth, document.body.scrollWidth]"
    assert max(browser.execute_script(script)) <= 375
    script = """return [...document.querySelectorAll("main *")].filter((one) =>
        one.getBoundingClientRect().right > 376 && !one.closest(".wide")
    ).map((one) => one.outerHTML.slice(0, 80))"""
    assert browser.execute_script(script) == []
    wide = browser.find_element("css selector", ".wide")
    assert wide.get_property("scrollWidth") > wide.get_property("clientWidth")


def luminance(colour):
    channels = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_dark_is_dark_and_both_are_legible(browser):
    backs = {}
    for scheme in ("light", "dark"):
        show(browser, scheme=scheme)
        script = """const of = (s, p) => getComputedStyle(document.querySelector(s))[p];
            return [of("html", "backgroundColor"), of("td", "color"), of("figcaption", "color"),
                    of("tbody a", "color"), of("svg text", "fill")]"""
        back, *texts = browser.execute_script(script)
        backs[scheme] = luminance(back)
        for text in texts:  # WCAG AA
            light, dark = sorted((luminance(back), luminance(text)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (scheme, text)
    assert backs["dark"] < 0.05 < 0.9 < backs["light"]


def test_a_link_opens_its_provenance(browser):
    table = table_of(browser, " m")
    link = table.find_elements("css selector", "tbody a")[2]
    target = browser.find_element("id", link.get_attribute("href").rpartition("#")[2])
    assert target.get_attribute("open") is None
    link.click()
    wait_for(lambda: target.get_attribute("open"))


def test_everything_has_a_name_for_a_screen_reader(browser):
    tree = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named = ("button", "link", "image", "combobox", "region", "table", "navigation")
    nameless = [
        node["role"]["value"]
        for node in tree
        if node.get("role", {}).get("value") in named
        and not node.get("ignored")
        and not node.get("name", {}).get("value")
    ]
    assert nameless == []
    roles = {node.get("role", {}).get("value") for node in tree}
    assert {"banner", "main", "contentinfo", "navigation", "heading", "table", "image"} <= roles
