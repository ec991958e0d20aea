"""Completions of the same prompts by several checkpoints and their dense models.

models = prepare_sample(["out/", "4710ae43"], prompts, setup)   # no model is loaded
sampled = sample(models, setup)                                 # one model in memory at a time
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunebench.calibration.vocabulary import vocabulary_size
from prunebench.checkpoints.find import find_checkpoint, local_checkpoint, option_in, require_scored
from prunebench.checkpoints.packed24 import Kind, dense_tensors, kind_of, unpacked
from prunebench.errors import IncompatibleData, MissingResource, OutOfMemory, UsageError
from prunebench.evaluate.generation import (
    LEAST_STEPS,
    Completion,
    Decoding,
    complete,
    encode_prompt,
    require_prompt,
)
from prunebench.models.linears import find_linears
from prunebench.models.load import load_config, load_model, load_tokenizer, skeleton
from prunebench.models.safetensors_files import check_weight_files
from prunebench.models.source import LocalModel, ModelSource, fetch_model, find_model
from prunebench.models.stored_model import stored_model
from prunebench.progress import Progress
from prunebench.results.schema import Result
from prunebench.results.store import ResultStore
from prunebench.run.dtype import choose_dtype
from prunebench.run.failures import memory_errors
from prunebench.sparse24.backends.table import backends
from prunebench.sparse24.backends.unpack import Decompress, Reference
from prunebench.sparse24.layer import convert
from prunebench.sparse24.policy import Policy
from prunebench.spec import AUTO, NO_RECOVERY


@dataclass(frozen=True)
class SampleSetup:
    """The arguments of `sample`.

    Attributes:
        store: Where results are looked up.
        device: Where models run.
        dtype: Of all models; `auto` is that in which a result was scored, else the checkpoint's.
        dense: Whether the dense models complete the prompts too.
        dense_name: The dense model of all checkpoints; None for those that the results name.
        chat: Whether prompts are put into the chat template.
        decoding: How tokens are chosen.
        progress: Shows the stages.
    """

    store: ResultStore
    device: torch.device
    dtype: str
    dense: bool
    dense_name: str | None
    chat: bool
    decoding: Decoding
    progress: Progress


@dataclass(frozen=True)
class SampleModel:
    """A model that is ready to be loaded.

    Attributes:
        name: Unique among those that are sampled.
        local: Its folder, with dense weights.
        stored: How the folder that the user named holds the weights.
        result: Of the run that made it, if known; of a dense model None.
        dtype: In which it is loaded.
        prompts: Their tokens, by its tokenizer.
        dense: The name of the dense model that it is compared with; its own for a dense model.
    """

    name: str
    local: LocalModel
    stored: Kind
    result: Result | None
    dtype: str
    tokenizer: Any
    prompts: tuple[tuple[int, ...], ...]
    dense: str | None

    @property
    def is_dense(self) -> bool:
        """Whether others are compared with it."""
        return self.dense == self.name


@dataclass
class Sampled:
    """What a model wrote, so far.

    Attributes:
        backend: The kernel of its packed layers; empty for dense products.
        completions: One for each prompt that it came to.
    """

    model: SampleModel
    backend: str = ""
    completions: list[Completion] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float | None:
        """Measured over the decode steps of all completions; None if they are too few."""
        steps = sum(completion.steps for completion in self.completions)
        seconds = sum(completion.seconds for completion in self.completions)
        return steps / seconds if steps >= LEAST_STEPS and seconds > 0 else None


def prepare_sample(
    names: Sequence[str], prompts: Sequence[str], setup: SampleSetup
) -> list[SampleModel]:
    """Find the checkpoints and their dense models, and tokenize the prompts; no model is loaded.

    A folder with packed weights is unpacked to the cache, once.

    Returns:
        Every dense model before those that are compared with it.

    Raises:
        PrunebenchError: The first thing that is wrong.
    """
    for prompt in prompts:
        require_prompt(prompt, option="a prompt")
    checkpoints = [(name, *find_checkpoint(name, setup.store)) for name in names]
    _require_distinct([folder for _, folder, _ in checkpoints])
    groups: dict[tuple[Path, str] | None, list[SampleModel]] = {}
    labels = _labels([(folder, result) for _, folder, result in checkpoints])
    for (_, folder, result), label in zip(checkpoints, labels, strict=True):
        asked = _asked_dtype(setup, result)
        model = _prepare(
            label, local_checkpoint(folder), prompts, setup, asked=asked, result=result
        )
        base = _dense_of(model, prompts, setup)
        key = (base.local.path, base.dtype) if base else None
        if base and key not in groups:
            number = sum(group is not None for group in groups)
            name = f"dense {base.local.source.id}" if number else "dense"
            groups[key] = [_named(base, name, dense=name)]
        group = groups.setdefault(key, [])
        group.append(_named(model, model.name, dense=group[0].name if base else None))
    return [model for group in groups.values() for model in group]


def sample(
    models: Sequence[SampleModel],
    setup: SampleSetup,
    *,
    sampled: list[Sampled],
) -> None:
    """Complete the prompts with one model after the other.

    Args:
        models: From `prepare_sample`.
        setup: The arguments.
        sampled: Gets what was written, also where an error or Ctrl-C ends it.

    Raises:
        KeyboardInterrupt: Ctrl-C; the last completion is what was written until then.
        PrunebenchError: A model cannot be loaded, or is broken.
    """
    for model in models:
        sampled.append(written := Sampled(model))
        try:
            with memory_errors(setup.device):
                _sample_one(model, setup, written)
        except OutOfMemory as error:
            error.fix = "use --dtype bfloat16, another --device, or fewer --max-new-tokens"
            raise
        # before the next is loaded: two models of 7B may not fit
        gc.collect()
        if setup.device.type == "cuda":
            torch.cuda.empty_cache()


def _sample_one(model: SampleModel, setup: SampleSetup, written: Sampled) -> None:
    """Load a model and complete the prompts; at the end nothing refers to its weights."""
    weights, written.backend = _load(model, setup)
    total = setup.decoding.max_new_tokens
    for number, ids in enumerate(model.prompts, 1):
        detail = f"{model.name}, prompt {number} of {len(model.prompts)}"
        with setup.progress.stage("text", total=total, detail=detail, unit="tokens") as advance:
            completion = complete(weights, model.tokenizer, ids, setup.decoding, advance=advance)
        written.completions.append(completion)
        if completion.finish == "interrupted":
            raise KeyboardInterrupt


# ---------------------------------------------------------------- what is sampled


def _prepare(
    name: str, local: LocalModel, prompts: Sequence[str], setup: SampleSetup, *, asked: str,
    result: Result | None,
) -> SampleModel:  # fmt: skip
    """Read config and tokenizer of a folder, tokenize the prompts, check what a result scored."""
    path = local.path
    if not (path / "config.json").is_file():
        raise IncompatibleData(
            f"{path} is not a checkpoint",
            where="it has no config.json",
            fix="name a folder written by run --save-model, export or save_pretrained",
        )
    check_weight_files(path)
    stored = kind_of(path)
    config, tokenizer = load_config(path), load_tokenizer(path)
    model = skeleton(config)
    vocabulary = vocabulary_size(model)
    ids = tuple(
        encode_prompt(prompt, tokenizer, config, vocabulary, name=name, chat=setup.chat)
        for prompt in prompts
    )
    if result is not None and result.model is not None:
        with setup.progress.stage("verify", detail=f"{name}: the weights that were scored"):
            require_scored(path, stored_model(model, dense_tensors(path)), result)
    dense = unpacked(local, setup.progress)
    choice = choose_dtype(asked, dense.source, dense.path, setup.device)
    for note in choice.notes:
        setup.progress.note(f"  {name}: {note}")
    return SampleModel(name, dense, stored, result, choice.dtype, tokenizer, ids, None)


def _named(model: SampleModel, name: str, *, dense: str | None) -> SampleModel:
    return dataclasses.replace(model, name=name, dense=dense)


def _asked_dtype(setup: SampleSetup, result: Result | None) -> str:
    if setup.dtype == AUTO and result is not None and result.model is not None:
        return result.model.dtype
    return setup.dtype


def _dense_of(
    model: SampleModel, prompts: Sequence[str], setup: SampleSetup
) -> SampleModel | None:  # fmt: skip
    """Return the dense model of a checkpoint; None, with a note, if it is not to be had."""
    if not setup.dense:
        return None
    result = model.result
    if setup.dense_name is not None:
        local = fetch_model(find_model(setup.dense_name), setup.progress)
    elif result is None:
        setup.progress.note(
            f"{model.name} holds no result that names its dense model: name it with --dense"
        )
        return None
    else:
        try:
            local = fetch_model(_source_of(result), setup.progress)
        except (MissingResource, UsageError) as error:
            setup.progress.note(
                f"{model.name}: without its dense model {result.spec.model}, which is not here "
                f"({error.what}): name it with --dense"
            )
            return None
        _require_revision(local, result)
    return _prepare("the dense model", local, prompts, setup, asked=model.dtype, result=None)


def _source_of(result: Result) -> ModelSource:
    """Return the source of the model that a run pruned.

    Raises:
        MissingResource: It was a folder or a file, which is gone.
        UsageError: The result does not say where it was.
    """
    kind = result.model.source if result.model else "hub"
    name = result.spec.model
    if kind in ("folder", "gguf"):
        # the result names the folder without its path; the command has it
        name = option_in(result, "--model", "-M") or name
    elif kind == "hub" and "/" in name and result.model and not result.model.pull_request:
        name = f"{name}@{result.model.revision}"
    return find_model(name)


def _require_revision(local: LocalModel, result: Result) -> None:
    if result.model is not None and local.revision != result.model.revision:
        raise IncompatibleData(
            f"{local.source.id} is not the model that {result.id} pruned",
            where=f"its revision is {local.revision[:24]}, not {result.model.revision[:24]}",
            fix="name that one with --dense, or leave it out with --no-dense",
        )


def _require_distinct(folders: Sequence[Path]) -> None:
    paths = [folder.resolve() for folder in folders]
    for place, path in enumerate(paths):
        if path in paths[:place]:
            raise UsageError(f"{folders[place]} is named twice", fix="name each checkpoint once")


def _labels(checkpoints: Sequence[tuple[Path, Result | None]]) -> list[str]:
    """Return method and sparsity of each checkpoint, with what tells two of a kind apart."""
    labels = [_label(folder, result) for folder, result in checkpoints]
    return [
        f"{label} ({_path_name(folder)})" if labels.count(label) > 1 or label == "dense" else label
        for label, (folder, _) in zip(labels, checkpoints, strict=True)
    ]


def _label(folder: Path, result: Result | None) -> str:
    if result is None:
        return _path_name(folder)
    spec = result.spec
    label = spec.method if spec.method == "dense" else f"{spec.method} {spec.sparsity}"
    if spec.allocation != "uniform":
        label += f" by {spec.allocation}"
    return label + (f", then {spec.recover}" if spec.recover != NO_RECOVERY else "")


def _path_name(folder: Path) -> str:
    # two folders may have one name: the path as it was typed
    return str(folder)


# ---------------------------------------------------------------- loading


def _load(model: SampleModel, setup: SampleSetup) -> tuple[nn.Module, str]:
    """Load a model, its 2:4 layers packed where the folder is and a kernel runs them packed."""
    detail = f"{model.name} in {model.dtype} on {setup.device}"
    with setup.progress.stage("load", detail=detail):
        dtype = getattr(torch, model.dtype)
        weights = load_model(model.local.path, dtype=dtype, device=setup.device)
    if model.stored != "packed24":
        return weights, ""
    linears = find_linears(weights)
    policy = Policy.load(setup.device)
    shape = (linears[0].out_features, linears[0].in_features)
    backend = policy.choose(shape, dtype, 1).backend
    # these two unpack a layer again for every token, which is slower than unpacked weights
    if isinstance(backends()[backend], Reference | Decompress):
        reasons = (v.reason for v in policy.verdicts(shape, dtype, 1).values() if not v.ok)
        setup.progress.note(
            f"  {model.name}: run with unpacked weights, no kernel for packed ones: "
            f"{next(iter(reasons), 'none is built in')}"
        )
        return weights, ""
    with setup.progress.stage("pack", detail=f"{len(linears)} linears, {backend}"):
        convert(weights, linears, policy=policy, for_memory=True)
    return weights, backend
