"""Write the recipe of an exported checkpoint: a TOML file that repeats its run."""

from __future__ import annotations

import json
import re
from typing import Any

from prunebench.calibration.texts import texts
from prunebench.models.source import catalog
from prunebench.options import options_of
from prunebench.results.schema import Result
from prunebench.spec import RunSpec

RECIPE_NAME = "recipe.toml"
ALLOCATION_NAME = "allocation.json"


def recipe_text(result: Result) -> str:
    """Return a TOML recipe that repeats a run: the same spec, given the same data.

    Named texts get their source (`NAME@wheel`). Local files are named by their hash, with a comment
    to put the path there, so that the recipe cannot run on another text by mistake.
    """
    spec, notes = result.spec, [f"repeats {result.id}: prunebench run --recipe {RECIPE_NAME}"]
    values: dict[str, Any] = {"method": spec.method, "model": _model_name(result, notes)}
    values |= {"sparsity": spec.sparsity, "dtype": spec.dtype, "allocation": spec.allocation}
    if spec.allocation == "file":
        values["allocation"] = f"file:{ALLOCATION_NAME}"
    if spec.within_block:
        values["within_block"] = spec.within_block
    if spec.calibration and spec.calibration_origin:
        values["calibration"] = _text_name(spec.calibration, spec.calibration_origin, notes)
        values["calibration_samples"] = spec.calibration_samples
        values["seqlen"] = spec.seqlen
    values["ppl"] = [
        _text_name(*pair, notes) for pair in zip(spec.ppl, spec.ppl_origins, strict=True)
    ]
    values["ppl_seqlen"] = spec.ppl_seqlen
    alias = catalog().get(values["model"])
    bos = alias.bos if alias else "text"  # the default of an alias is that of its model
    for name, option in options_of(RunSpec).items():
        value = getattr(spec, name)
        unread = value is None  # such as calibration data of a method without calibration
        default = bos if name in ("ppl_bos", "calibration_bos") else option.value
        if option.about.given and name not in values and not unread and value != default:
            values[name] = value
    values["seed"] = spec.seed
    options = dict(spec.method_options)
    for name, value in options.items():
        if str(value).startswith("sha256:"):  # only masks are named by their content
            notes.append(f"{name}: masks of your own, {value}; put their path there")
    if result.training is not None:
        training = result.training
        options["train_data"] = _text_names(training.text, training.origin, notes)
    lines = [*(f"# {note}" for note in notes), *_toml(values)]
    if options:
        lines += ["", "[set]", *_toml(options)]
    if spec.allocation_options and spec.allocation != "file":
        lines += ["", "[set.allocation]", *_toml(spec.allocation_options)]
    if spec.recover_options:
        options = dict(spec.recover_options)
        if result.recovery is not None and result.recovery.training is not None:
            trained = result.recovery.training
            text = _text_names(trained.text, trained.origin, notes)
            key = next(key for key in options if key.rpartition(".")[2] == "data")
            options[key] = text
        lines += ["", "[set.recover]", *_toml(options)]
    return "\n".join([*lines, ""])


def _model_name(result: Result, notes: list[str]) -> str:
    """Return the name of the model for `--model`; of a local one a note says to put its path."""
    assert result.model is not None
    name, revision = result.spec.model, result.model.revision
    if result.model.source == "hub" and "/" in name:
        return f"{name}@{revision}"
    if result.model.source in ("folder", "gguf"):
        notes.append(f"model: a {result.model.source} of your own, {revision}; put its path there")
        return f"./{name}" + (".gguf" if result.model.source == "gguf" else "")
    return name


def _text_name(resolved: str, origin: str, notes: list[str]) -> str:
    """Return the name of a text for `--calibration` and `--ppl`.

    Args:
        resolved: Its name in the spec: a protocol, or dataset and split.
        origin: Its origin in the spec.
        notes: Comments of the recipe; for a local file, one is appended that asks for its path.
    """
    for name, entry in texts().items():
        if origin == entry.url or (entry.sha256 and origin.startswith("sha256:") and (
            resolved.partition("/")[0] in (name, f"{name}-raw")
        )):  # fmt: skip
            return name
        if entry.file and re.fullmatch(rf"wheel:[^/]+/{re.escape(entry.file)}", origin):
            return f"{name}@wheel"
        if entry.hub and origin.startswith(f"hub:{entry.hub}@"):
            return f"{name}@hub"
    digest = origin.removeprefix("sha256:")[:12]
    kind, ending = ("tokens", "safetensors") if resolved.startswith("tokens") else ("file", "txt")
    notes.append(f"{kind}:{digest}.{ending}: a file of your own, {origin}; put its path there")
    return f"{kind}:{digest}.{ending}"


def _text_names(resolved: str, origin: str, notes: list[str]) -> str:
    """Return the name of a training text, which may be several split by commas."""
    pairs = zip(resolved.split(","), origin.split(","), strict=True)
    return ",".join(_text_name(*pair, notes) for pair in pairs)


def _toml(values: dict[str, Any]) -> list[str]:
    # quoted: a dot in a bare key is a table of its own
    return [
        f"{json.dumps(key) if '.' in key else key} = {_toml_value(value)}"
        for key, value in values.items()
    ]


def _toml_value(value: Any) -> str:
    if value is None:
        return '"none"'  # TOML has no null; options parse this word
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, int | float):
        return repr(value)
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
