"""One run of a recipe: its options, its command line, its name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prunebench.evaluate.records import task_table
from prunebench.results.published import PublishedValue
from prunebench.results.selection import OPTION, matches_word
from prunebench.run_options import spec_of
from prunebench.spec import NO_RECOVERY, RunSpec


@dataclass(frozen=True)
class RecipeCell:
    """One run of a recipe.

    Attributes:
        number: Index in the recipe, from 1.
        given: The options of `prunebench run` that the recipe sets.
        values: All options, with defaults.
    """

    number: int
    given: dict[str, Any]
    values: dict[str, Any]

    @property
    def arguments(self) -> list[str]:
        """The command-line arguments of `prunebench run`."""
        words: list[str] = []
        for key, value in self.given.items():
            # from keys, not from the parsed flags: the command must reproduce the cell without the
            # recipe
            option = f"--{key.replace('_', '-')}"
            if key == "set":
                for name, option_value in flat_options(value):
                    words += [option, f"{name}={option_word(option_value)}"]
            elif isinstance(value, bool):
                # a flag that is false is left out: there is no --no-...
                words += [option] if value else []
            else:
                words += [
                    option,
                    ",".join(value) if isinstance(value, list) else option_word(value),
                ]
        return words

    @property
    def name(self) -> str:
        """A short name: method, sparsity, allocation, options, model, seed."""
        values = self.values
        text = values["method"]
        # a dense run prunes nothing: its sparsity of 0 would only be noise
        if text != "dense":
            text += f" {values['sparsity']}"
        if values["allocation"] != "uniform":
            text += f", {values['allocation']}"
        if values["recover"] != NO_RECOVERY:
            text += f", then {values['recover']}"
        options = [
            f"{name}={option_word(option_value)}"
            for name, option_value in flat_options(self.given.get("set", {}))
        ]
        text += f", {' '.join(options)}" if options else ""
        return f"{text} on {values['model']}, seed {values['seed']}"

    @property
    def spec(self) -> RunSpec:
        """The spec, before names are resolved to content."""
        return spec_of(self.values)

    def matches(self, filters: Mapping[str, Sequence[str]]) -> bool:
        """Return whether `key=value,value` filters select the cell; a value may hold `*`.

        Of an option that is a list, such as `tasks`, one of its values is enough. `set.KEY` is an
        option that the recipe sets.
        """
        return all(
            any(matches_word(value, pattern) for value in self.value(key) for pattern in patterns)
            for key, patterns in filters.items()
        )

    def value(self, key: str) -> list[Any]:
        """Return the values of a selector's key; an empty list is `[None]`."""
        if key.startswith(OPTION):
            return [
                # "-" stands for: this cell does not set the option (its default holds)
                dict(flat_options(self.given.get("set", {}))).get(key.removeprefix(OPTION), "-")
            ]
        value = self.values[key]
        return list(value or [None]) if isinstance(value, tuple | list) else [value]

    def scores(self, value: PublishedValue) -> bool:
        """Return whether its scores are comparable with a published or measured value."""
        options = self.values
        if any(
            options[key] != getattr(value, key)
            for key in ("method", "sparsity", "model", "allocation", "recover")
        ):
            return False
        if value.metric == "token_ppl":
            # wikitext2@hub and wikitext2:PATH are the text wikitext2
            texts = [re.split("[@:]", name)[0] for name in options["ppl"]]
            # perplexities of other windows, other lengths or another BOS are not comparable
            asked_so = (value.seqlen, value.limit, value.bos) == (
                options["ppl_seqlen"], options["ppl_tokens"], options["ppl_bos"],
            )  # fmt: skip
            return asked_so and value.dataset in texts
        # wanda7 and the like stand for the tasks of a paper
        presets = task_table()["preset"]
        asked = {task for name in options["tasks"] for task in presets.get(name, [name])}
        # all published accuracies are zero-shot; None is the task's own setting
        zero_shot = options["num_fewshot"] in (None, 0) and not options["apply_chat_template"]
        return zero_shot and options["limit"] == value.limit and set(value.tasks) <= asked


def flat_options(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the options of a nested table, with dots between the names."""
    for name, value in options.items():
        if isinstance(value, dict):
            yield from flat_options(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def option_word(value: Any) -> str:
    """Return a value as the command line takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
