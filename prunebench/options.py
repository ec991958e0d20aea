"""The options of a run by name: their types, their defaults, and the shorthands they allow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prunebench.calibration.texts import text_presets
from prunebench.errors import UsageError, nearest
from prunebench.models.source import find_model
from prunebench.pruners import METHODS
from prunebench.sparsity import Sparsity
from prunebench.spec import (
    AUTO,
    BOS_PLACES,
    DTYPES,
    EXECUTIONS,
    ORDERS,
    PLACEMENTS,
    WEIGHTS,
    RunSpec,
)

RUN_KEYS: dict[str, type | tuple[type, ...]] = {
    "method": str,
    "model": str,
    "sparsity": (str, float, int),
    "allocation": str,
    "calibration": str,
    "calibration_samples": int,
    "seqlen": int,
    "calibration_bos": str,
    "ppl": (str, list),
    "ppl_seqlen": int,
    "ppl_tokens": int,
    "ppl_bos": str,
    "divergence": bool,
    "tasks": (str, list),
    "num_fewshot": int,
    "limit": int,
    "apply_chat_template": bool,
    "execute": str,
    "seed": int,
    "dtype": str,
    "within_block": str,
    "device": str,
    "weights": str,
    "activations": str,
    "set": dict,
}
OUTSIDE_SPEC = ("device", "weights", "activations")
_ALLOCATION = "allocation."  # begins the options of the allocator among those of --set


def with_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return every option of a run: what was given, and the defaults of the method and model.

    Raises:
        UsageError: No method is named, or a name is unknown.
    """
    if "method" not in given:
        raise UsageError(
            "no method is named", fix="give --method, for example --method wanda; see list methods"
        )
    row = METHODS.find(given["method"])
    values: dict[str, Any] = {
        name: field.default
        for name, field in RunSpec.model_fields.items()
        if name in RUN_KEYS and name != "method"
    }
    source = find_model(given.get("model", values["model"]))
    values |= {"sparsity": row.sparsity, "allocation": row.allocation}
    values |= {"device": "auto", "weights": "auto", "activations": "device"}
    values["dtype"] = AUTO
    values |= {key: value for key, value in given.items() if key != "set"}
    if values["dtype"] == AUTO and (source.entry or source.kind == "gguf"):
        values["dtype"] = source.entry.dtype if source.entry else "float32"
    for name, known in (
        ("dtype", (*DTYPES, AUTO)),
        ("within_block", ORDERS),
        ("execute", EXECUTIONS),
        ("calibration_bos", BOS_PLACES),
        ("ppl_bos", BOS_PLACES),
        ("weights", WEIGHTS),
        ("activations", PLACEMENTS),
    ):
        if values[name] not in known:
            raise UsageError(
                f"--{name.replace('_', '-')} {values[name]!r} is not known",
                fix=nearest(str(values[name]), known),
            )
    sparsity = values["sparsity"]
    text = ",".join(sparsity) if isinstance(sparsity, list) else str(sparsity)
    values["sparsity"] = str(Sparsity.parse(text))
    values["ppl"], values["tasks"] = _names(values["ppl"]), _names(values["tasks"])
    _expand_text_preset(values, given)
    options = read_options(given.get("set", ()))
    of_allocation = {k for k in options if k.startswith(_ALLOCATION)}
    values["method_options"] = {k: v for k, v in options.items() if k not in of_allocation}
    values["allocation_options"] = {k.removeprefix(_ALLOCATION): options[k] for k in of_allocation}
    return values


def _names(value: Any) -> tuple[str, ...]:
    """Split names by commas."""
    words = [value] if isinstance(value, str) else list(value)
    return tuple(name.strip() for word in words for name in word.split(",") if name.strip())


def _expand_text_preset(values: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Replace a paper's protocol (`--ppl wanda-4096`) by its texts and its window length."""
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
    """Read the words of --set, or the table [set] of a recipe, which may hold [set.allocation]."""
    if isinstance(given, dict):
        nested = given.get("allocation")
        inner = nested if isinstance(nested, dict) else {}
        flat = {k: v for k, v in given.items() if k != "allocation" or v is not nested or not inner}
        return flat | {f"{_ALLOCATION}{k}": v for k, v in inner.items()}
    options: dict[str, Any] = {}
    for word in given:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {word!r} is not KEY=VALUE", fix="as in --set alpha=100")
        if key in options:
            raise UsageError(f"--set names {key!r} twice")
        options[key] = value
    return options
