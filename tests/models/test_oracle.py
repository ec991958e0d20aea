"""Every causal language model of transformers: exact statistics and gradients, or refused by name.

What is exact is said by others than the code under test: `tests.oracle` for the inputs of every
linear, and autograd for the gradients. The list in docs/models.md is what came out;
`python -m tests.models.test_oracle` writes it.
"""

import re
import textwrap
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest

from prunebench.errors import IncompatibleData
from tests.oracle_checks import require_equal_gradients, require_equal_statistics
from tests.tiny_architectures import NOT_BUILT, tiny_architecture

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = (
    "<!-- architectures, from tests/models/test_oracle.py -->",
    "<!-- end of architectures -->",
)


def model_types():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@dataclass(frozen=True)
class Outcome:
    """What became of an architecture: why it, or its gradient alone, is refused; empty if not."""

    refused: str = ""
    no_gradients: str = ""


def outcome_of(model_type):
    model = tiny_architecture(model_type)
    try:
        require_equal_statistics(model, batch_tokens=10_000)
    except IncompatibleData as error:
        assert re.search(r"\w\.\w|[A-Z]\w+|a block", error.what), error.what  # it names something
        return Outcome(refused=reason_of(error))
    try:
        require_equal_gradients(model)
    except IncompatibleData as error:
        return Outcome(no_gradients=reason_of(error))
    return Outcome()


def reason_of(error):
    """The reason without what is of these tiny shapes alone: shares, and numbers of blocks."""
    linear = re.match(r"(?:the gradient of )?\S+?\.\d+\.(\S+)", error.what)
    subject = f"`{linear[1]}`: " if linear else ""
    text = error.where if error.where.count(" ") > 2 else error.what
    text = error.what if "returns" in error.what else text
    text = "its gradient is zero" if "zero everywhere" in error.what else text
    text = f"two lists of blocks, {text}" if "two lists" in error.what else text
    text = re.sub(r" \([\d.]+%\)| with \d+% of the matrices of both", "", text)
    text = re.sub(r" (before|after) block \d+|blocks \d+ and \d+", "", text).strip()
    text = "blocks share its weight" if text == "share its weight" else text
    return subject + text


def wrapped(line):
    indent = "  " if line.startswith("- ") else ""
    return textwrap.fill(line, 120, break_on_hyphens=False, subsequent_indent=indent)


def listing(outcomes):
    """The list of the page."""

    def lines(reasons):
        named = defaultdict(list)
        for name, reason in sorted(reasons.items()):
            named[reason].append(name)
        order = sorted(named.items(), key=lambda item: (-len(item[1]), item[1]))
        return [wrapped(f"- {', '.join(names)}: {reason}") for reason, names in order]

    exact = sorted(name for name, outcome in outcomes.items() if not outcome.refused)
    refused = {name: outcome.refused for name, outcome in outcomes.items() if outcome.refused}
    gradients = {
        name: outcome.no_gradients for name, outcome in outcomes.items() if outcome.no_gradients
    }
    return "\n".join(
        [
            BEGIN,
            f"**Exact** ({len(exact)}), by the names of transformers: the statistics of every",
            "linear are those of a plain forward pass, and the gradients those of autograd.",
            "",
            wrapped(", ".join(exact) + "."),
            "",
            f"Of these, methods that need gradients are **refused** for ({len(gradients)}):",
            "",
            *lines(gradients),
            "",
            f"**Refused by name** ({len(refused)}): for any method where it says `not covered` or",
            "two lists, else for methods that need calibration data.",
            "",
            *lines(refused),
            "",
            f"**Not tried** ({len(NOT_BUILT)}), because a tiny one cannot be built:",
            "",
            *lines(NOT_BUILT),
            END,
        ]
    )


@pytest.fixture(scope="module")
def outcomes():
    return {name: outcome_of(name) for name in model_types() if name not in NOT_BUILT}


@pytest.mark.slow
def test_every_architecture_is_exact_or_refused_by_name_and_the_page_says_which(outcomes):
    text = PAGE.read_text("utf-8")
    assert text[text.index(BEGIN) : text.index(END) + len(END)] == listing(outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(NOT_BUILT))
def test_what_is_said_not_to_build_still_does_not(model_type):
    with pytest.raises((AttributeError, ImportError, ValueError)):
        tiny_architecture(model_type)


def test_the_list_in_the_docs_has_every_architecture_once():
    text = PAGE.read_text("utf-8")
    section = text[text.index(BEGIN) : text.index(END)].replace("\n  ", " ")
    exact = re.search(r"autograd\.\n\n(.*?)\.\n\n", section, re.DOTALL)[1]
    exact = exact.replace("\n", " ").split(", ")
    refused = section[section.index("**Refused by name**") :]
    others = [name for line in re.findall(r"^- (.*?):", refused, re.M) for name in line.split(", ")]
    assert sorted([*exact, *others]) == sorted(model_types())


if __name__ == "__main__":
    text = PAGE.read_text("utf-8")
    new = listing({name: outcome_of(name) for name in model_types() if name not in NOT_BUILT})
    PAGE.write_text(text[: text.index(BEGIN)] + new + text[text.index(END) + len(END) :])
