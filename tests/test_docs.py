"""README and docs cannot drift: commands, options, links, tables and examples are checked."""

import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
from typer.main import get_command

from prunebench.allocators import ALLOCATORS as REGISTRY
from prunebench.allocators import BUILTIN as ALLOCATORS
from prunebench.calibration.texts import texts
from prunebench.cli import app
from prunebench.errors import PrunebenchError
from prunebench.pruners import BUILTIN, METHODS
from prunebench.pruners.maskllm.presets import PRESETS
from prunebench.recovery import BUILTIN as RECOVERER_ROWS
from prunebench.recovery import RECOVERERS
from prunebench.results.published import published_values
from prunebench.results.store import read_result
from prunebench.run_options import RUN_KEYS, RUN_OPTIONS
from prunebench.sparse24.backends.table import backends
from prunebench.sweep.recipe import read_recipe
from prunebench.testing import check_pruner
from tests.test_layers import LEVELS

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md")]
)
README, CLI, METHODS_PAGE, MASKLLM, RECIPES, BACKENDS = (
    (ROOT / name).read_text("utf-8")
    for name in (
        "README.md", "docs/cli.md", "docs/methods.md", "docs/maskllm.md", "docs/recipes.md",
        "docs/sparse24.md",
    )
)  # fmt: skip


def commands_of(page: Path) -> list[str]:
    return [
        line.strip().partition(" #")[0].strip()
        for line in page.read_text("utf-8").splitlines()
        if re.match(r"    (prunebench|torchrun .* -m prunebench) ", line)
    ]


COMMANDS = sorted({line for page in PAGES for line in commands_of(page)})


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def command_of(words):
    command = get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
        command = getattr(command, "command", command)  # imported here
    return command


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_in_the_pages_exist_with_their_options(line):
    words = shlex.split(line.rpartition("prunebench ")[2])
    command = command_of(words)
    flags = {flag for option in command.params for flag in [*option.opts, *option.secondary_opts]}
    assert not getattr(command, "commands", None), f"{line} names a group, not a command"
    assert {word for word in words if word.startswith("-")} <= flags, line


def all_flags() -> set[str]:
    groups = [c.command for c in get_command(app).commands.values()]
    commands = [c for group in groups for c in getattr(group, "commands", {"": group}).values()]
    options = [option for command in commands for option in command.params]
    return {flag for option in options for flag in [*option.opts, *option.secondary_opts]}


OF_OTHERS = {"--help", "--strict", "--nproc-per-node", "--index-url"}
OF_OTHERS |= {"--dry", "--only", "--markdown"}  # of benchmarks.gpu_acceptance
OF_OTHERS |= {"--methods", "--ppl-windows", "--write"}  # of benchmarks.scripts.rounding
CURRENT = [page for page in PAGES if page.name != "CHANGELOG.md"]  # that one names what was, too


@pytest.mark.parametrize("page", CURRENT, ids=page_id)
def test_options_that_a_page_names_exist(page):
    text = page.read_text("utf-8")
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+(?![\w*-])", text))
    assert flags <= all_flags() | OF_OTHERS
    keys = {
        kind: {key for name in names for key in registry.resolve_options(name, {}, seed=0)}
        for kind, registry, names in (
            ("", METHODS, BUILTIN),
            ("allocation.", REGISTRY, ALLOCATORS),
            ("recover.", RECOVERERS, RECOVERER_ROWS),
        )
    }
    for kind, key in re.findall(r"--set ((?:allocation|recover)\.)?([a-z_0-9]+)=", text):
        assert key in keys[kind] | {"power"}, key  # power: of the example


def test_the_page_of_commands_is_fresh():
    module = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    assert module["page"]() == CLI, "run `make docs`"


def test_the_defaults_that_tables_know_are_those_of_the_options():
    module = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    assert module["defaults"]() == module["DEFAULTS"].read_text("utf-8"), "run `make docs`"


def test_the_page_of_commands_has_everything():
    for name, command in get_command(app).commands.items():
        for sub in getattr(command.command, "commands", [""]):
            assert f"\n## {f'{name} {sub}'.strip()}\n" in CLI
    for option in RUN_OPTIONS.values():
        assert f"`{option.flag}" in CLI
        assert not option.variable or f"`{option.variable}`" in CLI
    for error in PrunebenchError.__subclasses__():
        assert f"\n| {error.exit_code} |" in CLI, error
    assert max(map(len, CLI.splitlines())) < 400


def test_every_method_allocator_and_command_has_its_row():
    for name, row in BUILTIN.items():
        (line,) = re.findall(
            rf"^\| `{name}` \|(?!.* seeds).*\| (?:yes|no) \|$", README, re.MULTILINE
        )
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        words = {True: "yes", False: "no"}
        assert cells[-2:] == [words[row.data], words[row.updates]], name
        assert not row.paper or f"https://arxiv.org/abs/{row.paper}" in cells[2], name
    for name in [*ALLOCATORS, *RECOVERER_ROWS]:
        assert f"\n| `{name}` |" in METHODS_PAGE
    for name in get_command(app).commands:
        assert f"`{name}`" in README


LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text("utf-8")):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_every_page_is_reached_from_the_readme():
    for page in ROOT.glob("docs/*.md"):
        assert f"(docs/{page.name})" in README, page.name


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_pages_are_readable_as_text(page):
    text = page.read_text("utf-8")
    wide = [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")]
    assert not wide
    assert not re.search(r"@@|TODO|FIXME", text)
    assert text.count("```") % 2 == 0


def test_the_readme_stays_short():
    lines = README.splitlines()
    table = README.partition("```text\n")[2].partition("```")[0].splitlines()
    assert len(lines) - len(table) <= 175 and len(table) <= 60  # the table grows with results/
    assert "make demo" in "\n".join(lines[:10])
    assert any(line.startswith("2:4 ") for line in lines[:36])


def test_the_example_of_a_run_is_a_result():
    (path,) = re.findall(r"saved to (results/\S+)", README)
    result = read_result(ROOT / path)
    (score,) = result.scores
    assert f"{score.value:.1f}  (dense {score.dense_value:.2f}, " in README
    assert f"pruned in {result.cost.prune_seconds:.1f} s\n" in README
    assert f"  {result.cost.total_seconds:.0f} s in all, " in README
    assert f"peak memory {result.cost.peak_rss_bytes / 1e9:.2f} GB\n" in README


def test_make_targets_in_the_pages_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    text = "\n".join(page.read_text("utf-8") for page in PAGES)
    named = set(re.findall(r"(?:`|    )make ([a-z0-9-]+)", text))
    assert named <= targets
    assert {"demo", "install", "check", "test", "test-real", "bench", "docs"} <= named


def test_the_table_of_the_readme_is_what_compare_prints():
    module = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    assert module["readme"]() == README, "run `make docs`"
    assert re.search(r"```text\nsmollm2-135m-q4 .*\n wanda ", README, re.DOTALL)


@pytest.mark.slow
def test_the_example_method_passes_the_contract(tmp_path, monkeypatch):
    (tmp_path / "my_method.py").write_text(example_method())
    monkeypatch.chdir(tmp_path)
    pruner = METHODS.make(
        "my_method:Mine", METHODS.resolve_options("my_method:Mine", {"power": "0.7"}, seed=0)
    )
    assert pruner.power == 0.7
    assert [str(o) for o in check_pruner(pruner) if not o.passed] == []


def example_method() -> str:
    return re.search(r"```python\n# my_method.py\n(.*?)```", README, re.DOTALL)[1]


def test_the_python_of_the_readme_runs(tiny_folder, text_file, eval_file, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    code = re.search(r"```python\n(import prunebench\n.*?)```", README, re.DOTALL)[1]
    assert 'calibration="c4"' in code
    monkeypatch.chdir(ROOT)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.config.max_position_embeddings = 2048
    names = {
        "model": model,
        "tokenizer": AutoTokenizer.from_pretrained(tiny_folder),
        "text": eval_file.read_text("utf-8"),
    }
    exec(code.replace('"c4"', repr(f"file:{text_file}")), names)
    assert names["report"].realised_ratio == 0.5
    assert len(names["df"]) > 100


def test_the_entry_points_that_pages_name_are_those_that_are_read():
    for text in (README, METHODS_PAGE):
        assert METHODS.entry_points in text
    for registry in (REGISTRY, RECOVERERS):
        assert registry.entry_points in METHODS_PAGE


def test_the_page_of_the_architecture_has_every_folder_and_level():
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    for folder in (ROOT / "prunebench").glob("*/__init__.py"):
        assert f"\n  {folder.parent.name}/ " in page, folder.parent.name
    block = re.search(r"import those above it:\n\n```\n(.*?)```", page, re.DOTALL)[1]
    levels = [set(line.split(", ")) for line in block.splitlines()]
    assert levels == [names - {"__init__"} for names in LEVELS[:-1]]


def test_the_example_recipe_is_valid(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(re.search(r"```toml\n(.*?)```", RECIPES, re.DOTALL)[1])
    recipe = read_recipe(path, complete=True)
    assert (len(recipe.cells), len(recipe.expectations)) == (4, 2)
    assert "ppl_seqlen" in RUN_KEYS


def test_every_recipe_and_the_number_of_published_values_are_in_the_docs():
    for path in sorted((ROOT / "recipes").glob("*.toml")):
        assert f"| `recipes/{path.name}` |" in RECIPES
        assert f"reproduce-{path.stem}:" in (ROOT / "Makefile").read_text("utf-8")
    assert f"{len(published_values()):,} values of" in RECIPES


def test_presets_and_backends_are_those_of_the_code():
    for name, preset in PRESETS.items():
        steps, batch, length = (preset[key] for key in ("steps", "batch", "train_seqlen"))
        assert f"| `{name}` | {steps:,} x {batch} x {length:,} |" in MASKLLM
    assert set(re.findall(r"^\| `(\w+)` \| (?!what)", BACKENDS, re.MULTILINE)) == set(backends())


NOT_RUN = {
    "--method maskllm": "learns for minutes; tests/maskllm runs it",
    "distill": "trains on more text than the tiny run has; tests/recovery runs it",
    "sweep ": "its cells prune real models; tests/sweep runs such",
    "recommend ": "races for minutes; tests/recommend runs it on a tiny model",
    "models fetch": "needs the hub",
    "--push": "needs an account of the hub",
    "torchrun": "needs eight GPUs",
}
REPLACED = {"-M", "--model", "--calibration", "--ppl", "--tasks", "--limit"}


def on_the_tiny_model(words: list[str], tiny_run: list[str]) -> list[str]:
    """Return a `run` of a page with the tiny model and its texts in place of the real ones."""
    # without `run` and --results-dir; recovery holds out an eighth of the windows
    kept, tiny = [], [*tiny_run[1:-2], "--calibration-samples", "8"]
    pairs = iter(words)
    for word in pairs:
        if word not in REPLACED:
            kept.append(word)
        elif (value := next(pairs)).startswith("tokens:"):
            kept += [word, value]
            tiny = [*tiny[:2], *tiny[4:]]  # without --calibration
    return [*kept, *tiny]


@pytest.fixture
def folder(cli, tmp_path):
    """A working directory like a clone's."""
    work = tmp_path / "work"
    shutil.copytree(ROOT / "results", work / "results")
    (work / "recipes").symlink_to(ROOT / "recipes")
    (work / "my_method.py").write_text(example_method())
    return work


@pytest.mark.parametrize("page", [page for page in PAGES if commands_of(page)], ids=page_id)
@pytest.mark.slow
def test_the_commands_of_a_page_work_one_after_the_other(page, cli, folder, tiny_run):
    for line in commands_of(page):
        if any(part in line for part in NOT_RUN):
            continue
        words = shlex.split(line)[1:]
        if words[0] == "run":
            words = on_the_tiny_model(words, tiny_run)
        if words[:2] in (["report", "-o"], ["export", "out/"]):
            words.append("--force")
        # no paper has values of the models in the committed results: said so, exit code 3
        cli(*words, code=3 if "--published" in words else 0)


def test_texts_name_their_license_and_where_they_come_from():
    for name, entry in texts().items():
        assert entry.license and entry.about and entry.uses, name
        assert entry.hub or entry.file or (entry.url and entry.sha256), name
        assert not entry.hub or len(entry.revision) == 40, name


def test_the_shared_environment_is_pinned():
    pins = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    assert "torch==2.13.0" in pins
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!-]+", pin) for pin in pins)
