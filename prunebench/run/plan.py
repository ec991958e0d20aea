"""Load and check the inputs of a run before any weight: windows, texts, tasks, masks.

A text that is too short, a token that the model has no row for, a full disk or a width that M does
not divide is found here, in seconds, and not after the pruning.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from prunebench.allocators.allocation import Allocation, load_allocation, require_sound
from prunebench.calibration.bos import check_bos, require_begun
from prunebench.calibration.texts import load_text
from prunebench.calibration.training import Training
from prunebench.calibration.vocabulary import require_known, vocabulary_size
from prunebench.calibration.windows import Windows, load_windows, sample_windows
from prunebench.checkpoints.packed24 import model_tensors
from prunebench.errors import IncompatibleData
from prunebench.evaluate.generation import encode_prompt
from prunebench.evaluate.outcome import Evaluator
from prunebench.evaluate.perplexity import PerplexityTask, prepare_perplexity
from prunebench.models.carried import carried_tensors, require_carriable
from prunebench.models.checkpoint_keys import check_tensors
from prunebench.models.linears import Linear, find_blocks, find_linears
from prunebench.models.load import load_config, load_tokenizer, require_context, skeleton
from prunebench.models.masks import Masks, open_masks
from prunebench.models.removal import require_removable
from prunebench.models.safetensors_files import stored_tensors, weight_files
from prunebench.models.stored_config import asked_attention
from prunebench.models.stored_dtype import StoredDtype
from prunebench.models.stored_model import stored_model
from prunebench.pruners.removal import BlockRemover, count_of_blocks
from prunebench.pruners.training import TrainingNeeds
from prunebench.results.completions import PROMPTS
from prunebench.results.schema import CalibrationBlock
from prunebench.run.place import place_weights
from prunebench.run.resolve import ResolvedSpec, path_in, require_outputs, resolve
from prunebench.run.trainings import prepare_training
from prunebench.run.unchanged import require_identity, require_same
from prunebench.spec import RunSpec, Setup, Weights


@dataclass(frozen=True, kw_only=True)
class Plan(ResolvedSpec):
    """A run with all inputs loaded and checked, except its weights.

    Attributes:
        tokenizer: The model's.
        linears: The prunable linears, without weights.
        allocation: The ratios of a file, where one was named.
        windows: Calibration tokens [samples, seqlen], for methods that read them.
        calibration: Their description in the result.
        texts: Scored first.
        tasks: Scored after the texts.
        training: Training windows, for methods that train.
        recovery_training: Training windows of `model_recoverer`.
        masks: The named masks, for methods that read them.
        prompts: Tokens of the prompts of --log-text.
        weights: `resident` or `disk`.
    """

    tokenizer: Any
    linears: list[Linear]
    allocation: Allocation | None
    windows: Windows | None
    calibration: CalibrationBlock | None
    texts: list[PerplexityTask]
    tasks: list[Evaluator]
    training: Training | None
    recovery_training: Training | None
    masks: Masks | None
    prompts: tuple[tuple[int, ...], ...]
    weights: Weights

    @property
    def trainings(self) -> tuple[Training, ...]:
        """What trains the whole model: the method, the recovery, both or neither."""
        return tuple(filter(None, (self.training, self.recovery_training)))


def prepare(spec: RunSpec, setup: Setup) -> Plan:
    """Resolve every name, fetch what is missing and check all that needs no weights.

    Raises:
        PrunebenchError: The first thing that is wrong.
    """
    return load_inputs(resolve(spec, setup))


def load_inputs(resolved: ResolvedSpec) -> Plan:
    """Read and cut the texts, the tasks and the masks of a run, and check that they fit the model.

    Raises:
        PrunebenchError: The first thing that is wrong.
    """
    for note in resolved.dtype.notes:
        resolved.progress.note(f"  {note}")
    with resolved.progress.stage("check", detail="config, tokenizer and sizes"):
        config = _read_config(resolved)
        tokenizer = load_tokenizer(resolved.model.path)
        # on the meta device: shapes of all weights, and no memory
        model = skeleton(config)
        # before any text is fetched: only headers of files are read
        _check_files(resolved, model)
    return inputs_for(resolved, model, config, tokenizer)


def inputs_for(resolved: ResolvedSpec, model: torch.nn.Module, config: Any, tokenizer: Any) -> Plan:
    """Read and cut the inputs of a run, and check that they fit a model.

    Args:
        resolved: The spec.
        model: On the meta device, or the model itself.
        config: Of the model.
        tokenizer: Of the model.

    Raises:
        PrunebenchError: The first thing that is wrong.
    """
    # `spec` holds contents (hashes, origins), `named` where to find them; files are read by name
    named = resolved.named
    _require_contexts(named, config)
    _check_bos(resolved, config, tokenizer)
    linears = find_linears(model)
    for linear in linears:
        resolved.sparsity.require_width(linear.in_features, name=linear.name)
    if isinstance(resolved.pruner, BlockRemover):
        _check_removal(resolved, model)
    allocation = _read_allocation(resolved, linears)
    vocabulary = vocabulary_size(model)
    windows, calibration = _calibrate(resolved, tokenizer, vocabulary)
    if windows is not None:
        # again, with the real length: that of a file of tokens is known only now
        require_context(config, windows.token_ids.shape[1], option="seqlen")
        if resolved.recoverer is not None:
            resolved.recoverer.check(samples=len(windows.token_ids))
    texts = _prepare_texts(resolved, tokenizer, vocabulary)
    for text in texts:
        require_context(config, text.windows.shape[1], option="ppl-seqlen")
    tasks = _prepare_tasks(resolved, tokenizer, vocabulary)
    masks = _open_masks(resolved, model, linears)
    need, recovery_need = resolved.pruner.needs.training, resolved.recovery_needs
    for wanted in resolved.training_needs:
        require_context(config, wanted.seqlen, option=f"set {wanted.seqlen_option}")
    training = prepare_training(resolved, need, resolved.training_text, tokenizer, vocabulary)
    recovery_training = prepare_training(
        resolved, recovery_need, resolved.recovery_text, tokenizer, vocabulary, recovers=True
    )
    read = [(need, training), (recovery_need, recovery_training)]
    _require_known(resolved, windows, texts, read, vocabulary, tokenizer)
    prompts = tuple(
        encode_prompt(prompt, tokenizer, config, vocabulary, name=resolved.spec.model)
        for prompt in PROMPTS[: resolved.setup.log_text]
    )
    weights = place_weights(resolved, model, tasks)
    if resolved.setup.save_model and weights == "resident":
        require_carriable(resolved.model.path, model)
    require_same(resolved, calibration, texts, masks)
    return Plan(
        **vars(resolved),
        tokenizer=tokenizer,
        linears=linears,
        allocation=allocation,
        windows=windows,
        calibration=calibration,
        texts=texts,
        tasks=tasks,
        training=training,
        recovery_training=recovery_training,
        masks=masks,
        prompts=prompts,
        weights=weights,
    )


def _read_config(resolved: ResolvedSpec) -> Any:
    path = resolved.model.path
    config, asked = load_config(path), asked_attention(path)
    # e.g. flash_attention_2 without the package: another kernel rounds differently
    if asked not in (None, config._attn_implementation):
        resolved.progress.note(
            f"  config.json asks for {asked}: run with {config._attn_implementation}"
        )
    return config


def _require_contexts(named: RunSpec, config: Any) -> None:
    # a file of tokens brings its own window length, and ignores --seqlen
    if named.seqlen is not None and not (named.calibration or "").startswith("tokens:"):
        require_context(config, named.seqlen, option="seqlen")


def _check_bos(resolved: ResolvedSpec, config: Any, tokenizer: Any) -> None:
    """Refuse windows that need a BOS which the tokenizer lacks; note where BOS is expected."""
    entry = resolved.model.source.entry
    # the catalog names models that need BOS in every window
    always = entry is not None and entry.bos == "window"
    note = check_bos(
        resolved.named, config, tokenizer, always=always, learns=bool(resolved.training_needs)
    )
    if note:
        resolved.progress.note(f"  {note}")


def _check_removal(resolved: ResolvedSpec, model: torch.nn.Module) -> None:
    """Refuse a number of blocks, or a model, that blocks cannot be removed from."""
    count_of_blocks(resolved.sparsity, len(find_blocks(model)[1]))
    require_removable(model)
    folder = resolved.model.path
    if resolved.setup.save_model:
        carried = carried_tensors(stored_model(model, stored_tensors(weight_files(folder))))
        if carried:
            raise IncompatibleData(
                f"{folder} cannot be saved without some of its blocks",
                where=f"it holds {len(carried)} tensors that the text model does not use, and "
                f"whose names may count blocks; the first is {min(carried)}",
                fix="run without --save-model",
            )


def _check_files(resolved: ResolvedSpec, model: torch.nn.Module) -> None:
    """Refuse files that do not match the model, and outputs that could not be saved."""
    path = resolved.model.path
    check_tensors(model, stored_tensors(weight_files(path)))
    size = StoredDtype.of(path).saved_bytes(resolved.spec.dtype)
    require_outputs(resolved.setup, need_model_bytes=size)


def _read_allocation(resolved: ResolvedSpec, linears: list[Linear]) -> Allocation | None:
    if resolved.allocator is not None:
        return None
    allocation = Allocation(load_allocation(path_in(resolved.named.allocation), linears))
    require_sound(allocation, linears, resolved.sparsity.ratio)
    return allocation


def _open_masks(resolved: ResolvedSpec, model: Any, linears: list[Linear]) -> Masks | None:
    name = resolved.pruner.needs.masks
    if name is None:
        return None
    with resolved.progress.stage("masks", detail=name):
        return open_masks(name, linears, resolved.progress, partial(model_tensors, model))


def _require_known(
    resolved: ResolvedSpec, windows: Windows | None, texts: list[PerplexityTask],
    trainings: list[tuple[TrainingNeeds | None, Training | None]], vocabulary: int, tokenizer: Any,
) -> None:  # fmt: skip
    """Refuse tokens that the model has no row for, but for those of tasks (`prepare_tasks`)."""
    named = resolved.named
    read = [(name, text.windows) for name, text in zip(named.ppl, texts, strict=True)]
    if windows is not None:
        read.append((named.calibration or "", windows.token_ids))
    for need, training in trainings:
        if training is not None and need is not None:
            parts = (training.train, training.held_out)
            read += [(need.text, part) for part in parts if part.numel()]  # none may be held out
    for name, token_ids in read:
        require_known(token_ids, vocabulary=vocabulary, source=name, tokenizer=tokenizer)


def _calibrate(
    resolved: ResolvedSpec, tokenizer: Any, vocabulary: int
) -> tuple[Windows | None, CalibrationBlock | None]:
    spec, name = resolved.spec, resolved.named.calibration
    if name is None or spec.calibration_samples is None or spec.seqlen is None:
        return None, None
    seed: int | None = spec.seed
    with resolved.progress.stage("calibration", detail=name):
        if name.startswith("tokens:"):
            windows = load_windows(path_in(name), vocabulary=vocabulary)
            require_begun(windows.token_ids, tokenizer, spec.calibration_bos, path=path_in(name))
            # nothing is sampled from a file of tokens, so no seed is recorded
            text, origin, seed = "tokens", f"sha256:{windows.sha256}", None
        else:
            source = load_text(name, use="calibration", progress=resolved.progress)
            require_identity(source, resolved.calibration_text)
            text, origin = source.name, source.origin
            windows = sample_windows(
                source, tokenizer, samples=spec.calibration_samples, seqlen=spec.seqlen,
                seed=spec.seed, bos=spec.calibration_bos,
            )  # fmt: skip
    # [samples, seqlen], also of a file of tokens
    samples, seqlen = windows.token_ids.shape
    block = CalibrationBlock(
        text=text,
        origin=origin,
        samples=samples,
        seqlen=seqlen,
        seed=seed,
        packed=windows.packed,
        tokens_sha256=windows.sha256,
        bos=spec.calibration_bos,
    )
    return windows, block


def _prepare_tasks(resolved: ResolvedSpec, tokenizer: Any, vocabulary: int) -> list[Evaluator]:
    spec, setup = resolved.spec, resolved.setup
    if not spec.tasks:
        return []
    from prunebench.evaluate.lm_eval_task import Protocol
    from prunebench.evaluate.tasks import prepare_tasks

    protocol = Protocol(
        num_fewshot=spec.num_fewshot,
        limit=spec.limit,
        apply_chat_template=spec.apply_chat_template,
        batch_size=setup.batch_size,
        include_path=setup.include_path,
    )
    with resolved.progress.stage("tasks", detail=", ".join(spec.tasks)):
        tasks = prepare_tasks(
            spec.tasks,
            protocol,
            tokenizer=tokenizer,
            vocabulary=vocabulary,
            progress=resolved.progress,
        )
    return [*tasks]


def _prepare_texts(resolved: ResolvedSpec, tokenizer: Any, vocabulary: int) -> list[PerplexityTask]:
    spec, texts = resolved.spec, []
    for name in resolved.named.ppl:
        with resolved.progress.stage("tokenize", detail=name):
            text = prepare_perplexity(
                name,
                tokenizer,
                seqlen=spec.ppl_seqlen,
                limit_tokens=spec.ppl_tokens,
                vocabulary=vocabulary,
                progress=resolved.progress,
                bos=spec.ppl_bos,
            )
        texts.append(text)
    return texts


# ---------------------------------------------------------------- inputs match the resolved spec
