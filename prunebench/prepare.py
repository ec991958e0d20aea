"""What a run does before it touches a weight: every name resolved, everything checked.

A wrong option, a text that is too short, a full disk or a width that M does not divide is found
here, in seconds, and not after the pruning.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from prunebench.allocators.allocation import (
    Allocation,
    Allocator,
    load_allocation,
    require_sound,
)
from prunebench.calibration.texts import Text, load_text
from prunebench.calibration.training import Training, training_windows
from prunebench.calibration.windows import Windows, load_windows, sample_windows
from prunebench.capacity import choose_weights, model_sizes
from prunebench.errors import UsageError
from prunebench.evaluate.outcome import Evaluator
from prunebench.evaluate.perplexity import PerplexityTask, prepare_perplexity
from prunebench.files import cache_dir, require_writable, sha256_file
from prunebench.models.carried import require_carriable
from prunebench.models.checkpoint_keys import check_tensors, match_keys
from prunebench.models.linears import Linear, find_linears
from prunebench.models.load import (
    choose_devices,
    is_emulated,
    load_config,
    load_tokenizer,
    require_context,
    skeleton,
)
from prunebench.models.masks import Masks, open_masks
from prunebench.models.safetensors_files import stored_tensors, weight_files
from prunebench.models.save import check_target
from prunebench.models.source import LocalModel, fetch_model, find_model
from prunebench.models.stored_config import asked_attention
from prunebench.names import check_names
from prunebench.progress import StageClock
from prunebench.pruners.layer import Needs, Pruner
from prunebench.results.schema import CalibrationBlock
from prunebench.results.store import ResultStore
from prunebench.sparse24.folder import unpacked
from prunebench.sparse24.guards import check_execution
from prunebench.sparsity import Sparsity
from prunebench.spec import RunSpec, Setup, Weights


@dataclass(frozen=True)
class Plan:
    """A run that has been checked as far as it can be without its weights.

    `allocator` is the rule that spreads the sparsity over the layers, or the ratios of a file;
    `devices` run calibration batches in turn, all else is done on the first; `texts` are scored
    first, then `tasks`; `weights` is where the weights will be;
    `training_text` is the name and origin of what is learned from.
    """

    spec: RunSpec
    setup: Setup
    store: ResultStore
    clock: StageClock
    devices: tuple[torch.device, ...]
    model: LocalModel
    tokenizer: Any
    pruner: Pruner
    allocator: Allocator | Allocation
    sparsity: Sparsity
    linears: list[Linear]
    windows: Windows | None
    calibration: CalibrationBlock | None
    texts: list[PerplexityTask]
    tasks: list[Evaluator]
    weights: Weights
    started: float
    training: Training | None = None
    training_text: tuple[str, str] | None = None
    masks: Masks | None = None

    @property
    def device(self) -> torch.device:
        """The device that holds the model."""
        return self.devices[0]


def prepare(spec: RunSpec, setup: Setup) -> Plan:
    """Resolve every name, fetch what is missing and check all that needs no weights.

    Raises:
        PrunebenchError: The first thing that is wrong.
    """
    started = time.perf_counter()
    clock = StageClock(setup.progress)
    with clock.stage("check", detail=f"{spec.method} on {spec.model}"):
        source = find_model(spec.model)
        named = check_names(spec, setup)
        spec, pruner, rule, sparsity = named.spec, named.pruner, named.allocator, named.sparsity
        spec = spec.model_copy(update={"model": source.id})
        devices = _devices(spec, setup, pruner, clock)
        check_execution(spec, sparsity, backend=setup.backend, device=devices[0])
        store = ResultStore(setup.results_dir)
        store.require_writable(spec)
        require_writable(cache_dir())
        _check_outputs(setup, need_model_bytes=1 << 20)
    local = unpacked(fetch_model(source, clock), clock)
    with clock.stage("check", detail="config, tokenizer and sizes"):
        config = _read_config(local, clock)
        if spec.seqlen is not None and not (spec.calibration or "").startswith("tokens:"):
            require_context(config, spec.seqlen, option="seqlen")
        if not all(name.startswith("tokens:") for name in spec.ppl):
            require_context(config, spec.ppl_seqlen, option="ppl-seqlen")
        tokenizer = load_tokenizer(local.path)
        model = skeleton(config)
        linears = find_linears(model)
        for linear in linears:
            sparsity.require_width(linear.in_features, name=linear.name)
        allocator: Allocator | Allocation
        if rule is None:
            spec, allocator = _read_allocation(spec, linears, sparsity)
        else:
            allocator = rule
        size = _require_whole(local, model)
    _check_outputs(setup, need_model_bytes=size)
    vocabulary = int(config.get_text_config().vocab_size)
    windows, calibration = _calibrate(spec, tokenizer, vocabulary, clock)
    if windows is not None:
        require_context(config, windows.token_ids.shape[1], option="seqlen")
    texts = _prepare_texts(spec, tokenizer, vocabulary, clock)
    tasks = _prepare_tasks(spec, setup, tokenizer, clock)
    spec, masks = _open_masks(spec, pruner, linears, clock)
    if pruner.needs.training is not None:
        require_context(config, pruner.needs.training.seqlen, option="set train_seqlen")
    spec, training, learned_from = _prepare_training(spec, pruner, tokenizer, vocabulary, clock)
    needs = (pruner.needs, *([] if rule is None else [rule.needs]))
    weights = _place_weights(spec, setup, local, model, needs, tasks, devices[0], clock)
    if setup.save_model and weights == "resident":
        require_carriable(local.path, model)
    spec = _resolved(spec, local, calibration, texts)
    _require_apart(learned_from, texts)
    if training is not None:
        training = replace(training, folder=cache_dir() / "training" / spec.spec_id)
    return Plan(
        spec, setup, store, clock, devices, local, tokenizer, pruner, allocator, sparsity, linears,
        windows, calibration, texts, tasks, weights, started, training, learned_from, masks,
    )  # fmt: skip


def _read_config(local: LocalModel, clock: StageClock) -> Any:
    config = load_config(local.path)
    asked = asked_attention(local.path)
    if asked not in (None, config._attn_implementation):
        clock.note(f"  config.json asks for {asked}: run with {config._attn_implementation}")
    return config


def _require_whole(local: LocalModel, model: torch.nn.Module) -> int:
    """Refuse files that are not the model's; return the bytes of their tensors."""
    stored = stored_tensors(weight_files(local.path))
    check_tensors(model, stored)
    return sum(tensor.stop - tensor.start for tensor in stored.values())


def _devices(
    spec: RunSpec, setup: Setup, pruner: Pruner, clock: StageClock
) -> tuple[torch.device, ...]:
    devices = choose_devices(setup.device)
    if len(devices) > 1 and pruner.needs.training is not None:
        raise UsageError(
            f"{spec.method} does not learn on several --device of one process",
            fix=f"torchrun --nproc-per-node {len(devices)} -m prunebench run ...",
        )
    if is_emulated(getattr(torch, spec.dtype), devices[0]):
        clock.note(f"  {spec.dtype} is emulated on this CPU: float32 is several times faster")
    return devices


def _read_allocation(
    spec: RunSpec, linears: list[Linear], sparsity: Sparsity
) -> tuple[RunSpec, Allocation]:
    """Read `file:PATH`; the spec then names the content, not the path."""
    path = Path(spec.allocation.partition(":")[2]).expanduser()
    allocation = Allocation(load_allocation(path, linears))
    require_sound(allocation, linears, sparsity.ratio)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    update = {"allocation": "file", "allocation_options": {"sha256": digest}}
    return spec.model_copy(update=update), allocation


def _open_masks(
    spec: RunSpec, pruner: Pruner, linears: list[Linear], clock: StageClock
) -> tuple[RunSpec, Masks | None]:
    """Find the masks that a method names; the spec then names their content."""
    name = pruner.needs.masks
    if name is None:
        return spec, None
    with clock.stage("masks", detail=name):
        masks = open_masks(name, linears, clock)
    options = {k: masks.origin if v == name else v for k, v in spec.method_options.items()}
    return spec.model_copy(update={"method_options": options}), masks


def _prepare_training(
    spec: RunSpec, pruner: Pruner, tokenizer: Any, vocabulary: int, clock: StageClock
) -> tuple[RunSpec, Training | None, tuple[str, str] | None]:
    """Cut what is learned from into windows; the spec then names their content."""
    need = pruner.needs.training
    if need is None:
        return spec, None, None
    with clock.stage("training", detail=need.text):
        source: Text | Path
        if need.text.startswith("tokens:"):
            source = Path(need.text.partition(":")[2]).expanduser()
            digest = sha256_file(source)
            text = (f"tokens-{digest[:12]}/all", f"sha256:{digest}")
        else:
            source = load_text(need.text, use="calibration", progress=clock)
            text = (f"{source.dataset}/{source.split}", source.origin)
        training = training_windows(
            source, tokenizer, samples=need.samples, seqlen=need.seqlen, held_out=need.held_out,
            least=need.least, seed=spec.seed, vocabulary=vocabulary,
        )  # fmt: skip
    options = {**spec.method_options, "train_data": text[0]}
    return spec.model_copy(update={"method_options": options}), training, text


def _require_apart(learned_from: tuple[str, str] | None, texts: list[PerplexityTask]) -> None:
    origin = learned_from[1] if learned_from else ""
    if origin.startswith("sha256:") and origin in {text.origin for text in texts}:
        raise UsageError(
            "one text is learned from and evaluated on",
            where="a score on the training text says nothing",
            fix="use another text for --set train_data or for --ppl",
        )


def _check_outputs(setup: Setup, *, need_model_bytes: int) -> None:
    folder, replace = setup.save_model, setup.replace
    if folder:
        check_target(folder, need_bytes=need_model_bytes, replace=replace, folder=True)
    for file in filter(None, (setup.save_masks, setup.save_calibration, setup.save_allocation)):
        check_target(file, need_bytes=1 << 20, replace=replace, folder=False)


def _calibrate(
    spec: RunSpec, tokenizer: Any, vocabulary: int, clock: StageClock
) -> tuple[Windows | None, CalibrationBlock | None]:
    name = spec.calibration
    if name is None or spec.calibration_samples is None or spec.seqlen is None:
        return None, None
    with clock.stage("calibration", detail=name):
        if name.startswith("tokens:"):
            windows = load_windows(Path(name.partition(":")[2]).expanduser(), vocabulary=vocabulary)
            text, origin, seed = "tokens", f"sha256:{windows.sha256}", None
        else:
            source = load_text(name, use="calibration", progress=clock)
            text, origin, seed = f"{source.dataset}/{source.split}", source.origin, spec.seed
            windows = sample_windows(
                source, tokenizer, samples=spec.calibration_samples, seqlen=spec.seqlen, seed=seed
            )
    samples, seqlen = windows.token_ids.shape
    block = CalibrationBlock(
        text=text,
        origin=origin,
        samples=samples,
        seqlen=seqlen,
        seed=seed,
        packed=windows.packed,
        tokens_sha256=windows.sha256,
    )
    return windows, block


def _prepare_tasks(
    spec: RunSpec, setup: Setup, tokenizer: Any, clock: StageClock
) -> list[Evaluator]:
    if not spec.tasks:
        return []
    from prunebench.evaluate.tasks import Protocol, prepare_tasks

    with clock.stage("tasks", detail=", ".join(spec.tasks)):
        protocol = Protocol(
            num_fewshot=spec.num_fewshot,
            limit=spec.limit,
            apply_chat_template=spec.apply_chat_template,
            batch_size=setup.batch_size,
            include_path=setup.include_path,
        )
        return [*prepare_tasks(spec.tasks, protocol, tokenizer=tokenizer, progress=clock)]


def _place_weights(
    spec: RunSpec,
    setup: Setup,
    local: LocalModel,
    model: torch.nn.Module,
    needs: Sequence[Needs],
    tasks: list[Evaluator],
    device: torch.device,
    clock: StageClock,
) -> Weights:
    """Decide where the weights will be, and say so where they will not be in memory.

    Raises:
        UsageError: The method, the allocator or a task needs all weights in memory.
        IncompatibleData: The checkpoint cannot be read a block at a time.
    """
    if setup.weights == "resident":
        return "resident"
    dtype = getattr(torch, spec.dtype)
    chosen, facts = choose_weights(model_sizes(model, dtype), device)
    if setup.weights == "auto":
        if chosen == "resident":
            return "resident"
        clock.note(f"weights stay on disk: {facts}")
    else:
        chosen = "disk"
    reason = ""
    if any(one.training is not None for one in needs):
        reason = f"{spec.method} learns, and runs every block forward and backward in each step"
    elif any(one.gradients for one in needs):
        reason = f"{spec.method} reads gradients, which need the whole model"
    elif any(one.whole_model for one in needs):
        reason = f"{spec.allocation} runs the whole model for every group of layers"
    for task in tasks:
        if getattr(task, "generates", False):
            reason = f"{task.name} makes the model write text, token by token"
    if reason:
        raise UsageError(
            f"--weights disk does not go with {spec.method} here",
            where=reason,
            fix=f"use --weights resident ({facts}), or leave it out",
        )
    match_keys(model, stored_tensors(weight_files(local.path)), dtype=dtype)
    return chosen


def _prepare_texts(
    spec: RunSpec, tokenizer: Any, vocabulary: int, clock: StageClock
) -> list[PerplexityTask]:
    texts = []
    for name in spec.ppl:
        with clock.stage("tokenise", detail=name):
            texts.append(
                prepare_perplexity(
                    name,
                    tokenizer,
                    seqlen=spec.ppl_seqlen,
                    limit_tokens=spec.ppl_tokens,
                    vocabulary=vocabulary,
                    progress=clock,
                )
            )
    return texts


def _resolved(
    spec: RunSpec,
    local: LocalModel,
    calibration: CalibrationBlock | None,
    texts: list[PerplexityTask],
) -> RunSpec:
    """Replace names by content: what a path pointed to, where a text came from.

    Raises:
        UsageError: The calibration text is also evaluated.
    """
    update: dict[str, Any] = {
        "model_revision": local.revision,
        "ppl": tuple(text.protocol for text in texts),
        "ppl_origins": tuple(text.origin for text in texts),
    }
    if calibration is not None:
        update |= {
            "calibration": calibration.text,
            "calibration_origin": calibration.origin,
            "calibration_samples": calibration.samples,
            "seqlen": calibration.seqlen,
        }
        for text in texts:
            if text.origin == calibration.origin and text.origin.startswith("sha256:"):
                raise UsageError(
                    f"{spec.calibration} is calibrated on and evaluated on",
                    where="a score on the calibration text says nothing",
                    fix="use another text for --calibration or for --ppl",
                )
    return spec.model_copy(update=update)
