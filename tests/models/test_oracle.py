"""Every causal language model of transformers: exact statistics and gradients, or refused by name.

What is exact is said by others than the code under test: `tests.oracle` for the inputs of every
linear, and autograd for the gradients. The README's list of architectures is what came out;
`python -m tests.models.test_oracle` writes it.
"""

import re
import textwrap
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from prunebench.errors import IncompatibleData
from prunebench.models.gradients import gradient_norms
from prunebench.models.linears import find_linears
from prunebench.models.walker import BlockWalker
from prunebench.testing import tiny_tokens
from tests.oracle import Oracle
from tests.tiny_architectures import NOT_BUILT, tiny_architecture

README = Path(__file__).parents[2] / "README.md"
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


def watch(model, tokens):
    """What an ordinary forward pass multiplies; experts one by one, as a user may choose."""
    experts = model.get_experts_implementation()
    if any(experts.values()):
        model.set_experts_implementation("eager")
    with torch.no_grad(), Oracle(model) as oracle:
        model(input_ids=tokens, use_cache=False)
    if any(experts.values()):
        model.set_experts_implementation(experts)
    return oracle


def require_equal_statistics(model, *, samples=5, **how):
    """Compare the walker's sums with the oracle's for every linear; return how many are idle."""
    tokens = tiny_tokens(samples=samples)
    oracle = watch(model, tokens)
    groups = list(BlockWalker(model, token_ids=tokens, **how).groups(stats=True, write=False))
    linears = [linear for group in groups for linear in group.linears]
    assert len(set(linears)) == len(linears), "a linear is pruned twice"
    assert {one.name for one in linears} == {one.name for one in find_linears(model)}
    idle = 0
    for group in groups:
        for linear in group.linears:
            stored = linear.stored
            place = stored.untyped_storage().data_ptr()
            step = stored.stride(0 if linear.transposed else 1)
            assert place not in oracle.others, f"{linear.name}: {oracle.others[place]}"
            expected = oracle.sums.get((place, stored.storage_offset(), step))
            if expected is None:
                assert group.stats.tokens == 0, f"{linear.name} is not used"
                idle += 1
                continue
            torch.testing.assert_close(
                group.stats.sum_squares, expected, rtol=1e-6, atol=0, msg=linear.name
            )
    return idle


def require_equal_gradients(model):
    """Compare sums of |gradient| over windows with autograd's, for every linear."""
    tokens, linears = tiny_tokens(samples=2, seqlen=16), find_linears(model)
    norms = gradient_norms(model, tokens, norm="l1")
    parameters = {one.parameter_name: getattr(one.module, one.attribute) for one in linears}
    expected = defaultdict(float)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    for window in tokens.split(1):
        logits = model(input_ids=window, use_cache=False).logits
        loss = functional.cross_entropy(logits[0, :-1].float(), window[0, 1:])
        made = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, made, strict=True):
            expected[name] = expected[name] + (0 if gradient is None else gradient.abs())
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    for linear in linears:
        gradient = torch.as_tensor(expected[linear.parameter_name])
        gradient = gradient if linear.expert is None else gradient[linear.expert]
        gradient = gradient.T if linear.transposed else gradient
        torch.testing.assert_close(
            norms.read(linear.name), gradient, rtol=1e-3, atol=1e-4 * float(gradient.max()),
            msg=linear.name,
        )  # fmt: skip


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
    """The README's list."""

    def lines(reasons):
        named = defaultdict(list)
        for name, reason in sorted(reasons.items()):
            named[reason].append(name)
        order = sorted(named.items(), key=lambda item: (-len(item[1]), item[1]))
        return [wrapped(f"- {', '.join(names)}: {reason}") for reason, names in order]

    exact = sorted(name for name, one in outcomes.items() if not one.refused)
    refused = {name: one.refused for name, one in outcomes.items() if one.refused}
    gradients = {name: one.no_gradients for name, one in outcomes.items() if one.no_gradients}
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
def test_every_architecture_is_exact_or_refused_by_name_and_the_readme_says_which(outcomes):
    text = README.read_text("utf-8")
    assert text[text.index(BEGIN) : text.index(END) + len(END)] == listing(outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(NOT_BUILT))
def test_what_is_said_not_to_build_still_does_not(model_type):
    with pytest.raises((AttributeError, ImportError, ValueError)):
        tiny_architecture(model_type)


def test_the_list_in_the_readme_has_every_architecture_once():
    text = README.read_text("utf-8")
    section = text[text.index(BEGIN) : text.index(END)].replace("\n  ", " ")
    exact = re.search(r"autograd\.\n\n(.*?)\.\n\n", section, re.DOTALL)[1]
    exact = exact.replace("\n", " ").split(", ")
    refused = section[section.index("**Refused by name**") :]
    others = [name for line in re.findall(r"^- (.*?):", refused, re.M) for name in line.split(", ")]
    assert sorted([*exact, *others]) == sorted(model_types())


if __name__ == "__main__":
    text = README.read_text("utf-8")
    new = listing({name: outcome_of(name) for name in model_types() if name not in NOT_BUILT})
    README.write_text(text[: text.index(BEGIN)] + new + text[text.index(END) + len(END) :])
