"""The model card of a pruned checkpoint, made from its result alone.

The front matter follows the hub's metadata (https://github.com/huggingface/hub-docs, modelcard.md):
scores are a `model-index`, one entry per protocol, which the hub shows and programs can read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from prunebench.models.source import CatalogEntry, catalog
from prunebench.results.recovery_schema import RecoveryBlock
from prunebench.results.schema import Result, Score
from prunebench.results.sizes import target_of

_TASK = "text-generation"
_IN_PLACE = "zeros are stored in place: the files are as large as the dense model's"
_METRICS = {"token_ppl": "perplexity", "acc": "accuracy"}  # the hub's names, where it has them
_LICENSES = {  # name in the catalog: on the hub (https://hf.co/docs/hub/repositories-licenses)
    "Apache-2.0": "apache-2.0",
    "Llama 2 Community": "llama2",
    "Llama 3 Community": "llama3",
    "Llama 3.1 Community": "llama3.1",
    "Gemma": "gemma",
    "BigScience RAIL 1.0": "bigscience-bloom-rail-1.0",
}


def model_card(
    result: Result,
    files: Mapping[str, str] | None = None,
    *,
    name: str,
    storage: str = _IN_PLACE,
    packed: bool = False,
) -> str:
    """Return the README of a pruned checkpoint.

    Args:
        result: A finished run.
        files: Descriptions of the other files in the folder, by name.
        name: What `from_pretrained` is to be called with: org/name, or the folder.
        storage: How the zeros are stored, as a sentence.
        packed: Whether transformers needs prunebench to read it.
    """
    parts = [
        f"---\n{front_matter(result)}---\n",
        f"# {_text(result.spec.model)}, {_what(result)}\n",
        *_about(result, storage),
        "\n## Use\n",
        *_use(name, packed=packed),
        "\n## Scores\n",
        *_scores(result),
        *_completions(result),
        "\n## Provenance\n",
        *_provenance(result),
    ]
    if files:
        parts += ["\n## Files\n", *(f"- `{name}`: {about}" for name, about in files.items())]
    command = " ".join(result.command.split("\n"))
    parts += ["\n## Repeat\n", f"    {command}", ""]
    return "\n".join(parts)


def front_matter(result: Result) -> str:
    """Return the YAML at the top of the card, without its fences."""
    from huggingface_hub import EvalResult, ModelCardData

    spec, entry = result.spec, base_entry(result)
    scores = [
        EvalResult(
            task_type=_TASK,
            dataset_type=score.dataset,
            dataset_name=score.protocol,
            dataset_config=score.protocol,  # entries are distinguished by it, not by their name
            metric_type=_METRICS.get(score.metric, score.metric),
            metric_name=f"{score.metric} ({score.protocol})",
            metric_value=score.value,
        )
        for score in result.scores
        if math.isfinite(score.value)
    ]
    base = None
    if result.model is not None and result.model.source == "hub":
        base = entry.hub if entry else spec.model
    tags = ["prunebench", "sparsity"]
    tags += ["pruned", spec.method.replace(":", ".")] if spec.method != "dense" else []
    license_fields = _license(entry)
    card = ModelCardData(
        library_name="transformers",
        pipeline_tag=_TASK,
        base_model=base,
        tags=tags,
        model_name=f"{spec.model_slug}-{spec.cell}",
        eval_results=scores or None,
        license=license_fields.get("license"),
        license_name=license_fields.get("license_name"),
        license_link=license_fields.get("license_link"),
    )
    return str(card.to_yaml(line_break="\n")) + "\n"


def base_entry(result: Result) -> CatalogEntry | None:
    """Return the row of the catalog for the model that was pruned, or None.

    A local folder with the name of an alias is not that model.
    """
    if result.model is None or result.model.source not in ("hub", "wheel"):
        return None
    entry = catalog().get(result.spec.model)
    return entry or next((e for e in catalog().values() if e.hub == result.spec.model), None)


def _license(entry: CatalogEntry | None) -> dict[str, str]:
    """Return the license fields of the front matter; empty if the license is unknown."""
    if entry is None:
        return {}
    if entry.license in _LICENSES:
        return {"license": _LICENSES[entry.license]}
    named = {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", entry.license.lower())}
    if entry.hub:
        named["license_link"] = f"https://huggingface.co/{entry.hub}"
    return {key: value.strip("-") for key, value in named.items()}


def _what(result: Result) -> str:
    name = _text(result.spec.method)
    return name if name == "dense" else f"{name} at {target_of(result)}"


def _about(result: Result, storage: str) -> list[str]:
    model, method, sparsity = result.model, result.method, result.sparsity
    assert model is not None and method is not None and sparsity is not None
    link = (
        f" ([arXiv:{method.paper}](https://arxiv.org/abs/{method.paper}))" if method.paper else ""
    )
    lines = [
        "Made with [prunebench](https://github.com/prunebench/prunebench) by "
        f"`{method.name}`{link}: `{method.implementation}` of {method.version}.\n",
        *_zeros(result, storage),
        f"- base weights: {_text(result.spec.model)}, {model.commit}, in {model.dtype}",
    ]
    if result.quantization:
        grid = result.quantization
        group = "row" if grid.group_size == -1 else f"group of {grid.group_size} weights of a row"
        lines.append(
            f"- those weights have {grid.bits} bits, with a float16 step for each {group}; the "
            "files hold step times code, not the codes: they are as large as the dense model's"
        )
    if method.options:
        lines.append(f"- options: {_options(method.options)}")
    if result.allocation:
        allocation = result.allocation
        lines.append(
            f"- spread over the layers by `{allocation.name}`: {_options(allocation.options)}"
        )
    if result.recovery:
        recovery = result.recovery
        lines.append(
            f"- kept weights trained afterwards by `{recovery.name}`{_extent(recovery)}, the zeros "
            f"untouched: {_options(recovery.options)}"
        )
    if result.spec.within_block:
        lines.append(f"- within a block: {result.spec.within_block}")
    if result.calibration:
        text = result.calibration
        lines.append(
            f"- calibrated on {text.samples} x {text.seqlen} tokens of {_text(text.text)} "
            f"({_text(text.origin)}), seed {text.seed}"
            + (", BOS at the beginning of each window" if text.bos == "window" else "")
        )
    else:
        lines.append("- no calibration data")
    if method.events:
        kinds = ", ".join(sorted({event.kind for event in method.events}))
        lines.append(f"- {len(method.events)} notes of the method: {_text(kinds)}")
    return lines


def _zeros(result: Result, storage: str) -> list[str]:
    """Return what is zero and how it is stored, or which blocks are gone."""
    model, sparsity = result.model, result.sparsity
    assert model is not None and sparsity is not None
    removal = sparsity.removal
    if removal is not None:
        numbers = ", ".join(map(str, sorted(removal.blocks)))
        return [
            f"- {len(removal.blocks)} of {removal.blocks_before} decoder blocks are removed "
            f"({numbers} of the dense model, counted from 0): {result.removed_ratio:.2%} of the "
            f"{model.prunable_parameters:,} weights in the linear layers of the blocks, "
            f"{removal.removed_parameters / model.parameters:.2%} of all {model.parameters:,} "
            "parameters",
            "- no other weight was changed: the config has fewer layers, and transformers loads "
            "the folder as it is",
        ]
    return [
        f"- {sparsity.realised_ratio:.2%} of the {model.prunable_parameters:,} weights in the "
        "linear layers of the decoder blocks are zero; embeddings, norms, biases and the output "
        "layer are dense",
        f"- {storage}",
    ]


def _use(name: str, *, packed: bool) -> list[str]:
    """Return code that loads the model and generates a text."""
    lines = ["Needs `pip install prunebench`, which teaches transformers to read it.\n"]
    return [
        *(lines if packed else []),
        "```python",
        *(["import prunebench  # before the model is loaded"] if packed else []),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({name!r})",
        f"tokenizer = AutoTokenizer.from_pretrained({name!r})",
        'inputs = tokenizer("Once upon a time", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))",
        "```",
    ]


def _extent(recovery: RecoveryBlock) -> str:
    """Return where trained weights stayed, and what the whole model was trained on."""
    parts = []
    if recovery.blocks:
        parts.append(f"in {recovery.recovered_blocks} of {len(recovery.blocks)} blocks")
    training = recovery.training
    if training:
        parts.append(
            f"end to end on {training.tokens:,} tokens of {_text(training.text)} "
            f"(step {training.best_step} of {training.steps})"
        )
    return " " + ", then ".join(parts)


def _options(options: Mapping[str, object]) -> str:
    return ", ".join(f"`{key}={value}`" for key, value in sorted(options.items())) or "no options"


def _scores(result: Result) -> list[str]:
    lines = ["| metric | protocol | this model | dense |", "|---|---|---:|---:|"]
    for score in result.scores:
        here = _value(score, score.value, score.stderr)
        dense = ""
        if score.dense_value is not None:
            dense = _value(score, score.dense_value, score.dense_stderr)
        lines.append(f"| {_text(score.metric)} | {_text(score.protocol)} | {here} | {dense} |")
    if any(score.stderr is not None for score in result.scores):
        lines += ["", "± is the standard error over documents or windows."]
    if any(score.limited for score in result.scores):
        lines += ["", "Protocols that end in `first-N` used only a part of their data."]
    return lines


def _value(score: Score, value: float, stderr: float | None) -> str:
    digits = 3 if score.metric == "token_ppl" else 4
    return f"{value:.{digits}f}" + (f" ± {stderr:.{digits}f}" if stderr is not None else "")


def _completions(result: Result) -> list[str]:
    """Return what the model wrote after the prompts of --log-text, beside the dense model."""
    if result.completions is None:
        return []
    lines = [
        "\n## Completions\n",
        f"Greedy, at most {result.completions.max_new_tokens} tokens, of fixed prompts.\n",
        "| prompt | this model | dense |",
        "|---|---|---|",
    ]
    for row in result.completions.completions:
        lines.append(f"| {_text(row.prompt)} | {_text(row.text)} | {_text(row.dense_text)} |")
    return lines


def _provenance(result: Result) -> list[str]:
    model, software, hardware = result.model, result.software, result.hardware
    assert model is not None
    rows = {
        "result": f"`{result.id}`, spec `{result.spec_id}`, {result.created_at}",
        "weights scored": f"`sha256:{model.evaluated_sha256}`",
        "dense weights": f"`sha256:{model.dense_sha256}`",
    }
    if result.calibration:
        rows["calibration tokens"] = f"`sha256:{result.calibration.tokens_sha256}`"
    for score in result.scores:
        rows[f"scored data, {_text(score.protocol)}"] = (
            f"{_text(score.origin)}, `sha256:{score.tokens_sha256}`"
        )
    rows["software"] = (
        f"prunebench {software.prunebench}, torch {software.torch}, "
        f"transformers {software.transformers}, python {software.python}"
    )
    rows["hardware"] = f"{hardware.device}, {_text(hardware.device_name)}"
    return [
        *(f"- {name}: {value}" for name, value in rows.items()),
        "- the hash of weights is taken over name, dtype, shape and bytes of every parameter",
    ]


def _text(text: str) -> str:
    """Escape characters that Markdown or HTML interprets, and keep the text on one line."""
    return re.sub(r"([\\`*|<>\[\]])", r"\\\1", " ".join(text.split()))
