"""The options of a run by name, with their defaults and the shorthands that they allow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prunebench.errors import UsageError
from prunebench.options import options_of
from prunebench.pruners import METHODS
from prunebench.sparsity import Sparsity
from prunebench.spec import AUTO, RunSpec, Setup, build_spec

RUN_OPTIONS = {
    name: option for name, option in options_of(RunSpec, Setup).items() if option.about.given
}
"""Every option of a run: those of the spec, then those of the set-up."""

RUN_KEYS: dict[str, tuple[type, ...]] = {
    name: option.recipe_types for name, option in RUN_OPTIONS.items() if option.about.recipe
} | {"set": (dict,)}
"""What a recipe may hold, and the types it may give."""

_PREFIXES = {"allocation_options": "allocation.", "recover_options": "recover."}
"""How the options of the allocator and of the recoverer begin in --set."""


def with_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return every option of a run: what was given, and the defaults of the method and model.

    Raises:
        UsageError: No method is named, or a name is unknown.
    """
    from prunebench.models.source import find_model

    if "method" not in given:
        raise UsageError(
            "no method is named", fix="give --method, for example --method wanda; see list methods"
        )
    row = METHODS.find(given["method"])
    options = {name: option for name, option in RUN_OPTIONS.items() if option.about.recipe}
    values = {name: option.value for name, option in options.items()}
    source = find_model(given.get("model", values["model"]))
    # the method's own defaults (dense: 0) replace those of the spec
    values |= {"sparsity": row.sparsity, "allocation": row.allocation}
    # a run without --dtype means auto; only a RunSpec built in Python defaults to float32
    values["dtype"] = AUTO
    # a model that makes no sense without BOS in every window has it unless `text` is asked for
    if source.entry:
        values |= {"ppl_bos": source.entry.bos, "calibration_bos": source.entry.bos}
    values |= {key: value for key, value in given.items() if key != "set"}
    # known from the name alone, so that a table or --show-config can say it without the files
    if values["dtype"] == AUTO and (source.entry or source.kind == "gguf"):
        values["dtype"] = source.entry.dtype if source.entry else "float32"
    for name, option in options.items():
        option.require(values[name])
    sparsity = values["sparsity"]
    text = ",".join(sparsity) if isinstance(sparsity, list) else str(sparsity)
    # one spelling: 50%, 0.50 and 0.5 are the same row
    values["sparsity"] = str(Sparsity.parse(text))
    values |= {k: _names(values[k]) for k, option in options.items() if option.kind is tuple}
    # after the names were split; `given` tells whether --ppl-seqlen was the user's
    _expand_text_preset(values, given)
    words = read_options(given.get("set", ()))
    for field, prefix in _PREFIXES.items():
        values[field] = {
            key.removeprefix(prefix): words.pop(key)
            for key in list(words)
            if key.startswith(prefix)
        }
    values["method_options"] = words
    return values


def spec_of(values: Mapping[str, Any]) -> RunSpec:
    """Build the spec from the values of `with_defaults`.

    Raises:
        UsageError: A value is out of range or of the wrong kind.
    """
    return build_spec({key: value for key, value in values.items() if key in RunSpec.model_fields})


def _names(value: Any) -> tuple[str, ...]:
    """Split names by commas."""
    words = [value] if isinstance(value, str) else list(value)
    return tuple(name.strip() for word in words for name in word.split(",") if name.strip())


def _expand_text_preset(values: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Replace a paper's protocol (`--ppl wanda-4096`) by its texts and its window length."""
    from prunebench.calibration.texts import text_presets

    presets = [name for name in values["ppl"] if name in text_presets()]
    if not presets:
        return
    if len(values["ppl"]) > 1:
        raise UsageError(
            f"--ppl {presets[0]} is a whole protocol and stands alone",
            fix=f"it means {','.join(text_presets()[presets[0]].texts)} with --ppl-seqlen "
            f"{text_presets()[presets[0]].seqlen}",
        )
    preset = text_presets()[presets[0]]
    if given.get("ppl_seqlen", preset.seqlen) != preset.seqlen:
        raise UsageError(
            f"--ppl {presets[0]} has windows of {preset.seqlen} tokens",
            fix="leave --ppl-seqlen out, or name the texts",
        )
    values["ppl"], values["ppl_seqlen"] = preset.texts, preset.seqlen


def read_options(given: Any) -> dict[str, Any]:
    """Read the words of --set, or the table [set] of a recipe with its inner tables.

    [set.allocation] and [set.recover] hold the options of the allocator and of the recoverer.
    """
    if isinstance(given, dict):
        flat: dict[str, Any] = {}
        prefixes = {prefix.removesuffix("."): prefix for prefix in _PREFIXES.values()}
        for key, value in given.items():
            # a method may have an option of its own called `allocation`; only a non-empty table is
            # the allocator's
            if key in prefixes and isinstance(value, dict) and value:
                flat |= {f"{prefixes[key]}{name}": inner for name, inner in value.items()}
            else:
                flat[key] = value
        return flat
    options: dict[str, Any] = {}
    for word in given:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {word!r} is not KEY=VALUE", fix="as in --set alpha=100")
        # twice the same key is a slip; silently using the last would hide it
        if key in options:
            raise UsageError(f"--set names {key!r} twice")
        options[key] = value
    return options
