"""The trainings of a run: their windows, and what is saved of them while they last."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from prunebench.calibration.text_list import load_texts
from prunebench.calibration.texts import TextIdentity
from prunebench.calibration.training import Training, training_windows
from prunebench.files import cache_dir
from prunebench.pruners.training import TrainingNeeds
from prunebench.run.code import code_sha256
from prunebench.run.resolve import ResolvedSpec, path_in
from prunebench.run.unchanged import require_identity
from prunebench.spec import RunSpec
from prunebench.training.state_folder import TrainingInfo, training_info


def prepare_training(
    resolved: ResolvedSpec, need: TrainingNeeds | None, text: TextIdentity | None, tokenizer: Any,
    vocabulary: int, *, recovers: bool = False,
) -> Training | None:  # fmt: skip
    """Cut a training text into windows.

    Args:
        resolved: The run.
        need: What to train on; None gives None.
        text: What the text of the spec is; None for a file of tokens.
        tokenizer: The model's.
        vocabulary: Rows of the model's embedding.
        recovers: Whether the recovery is trained, not the method.

    Raises:
        CheckFailed: The text has changed.
        IncompatibleData: It is too short, or its tokens are not the model's.
    """
    progress, spec = resolved.progress, resolved.spec
    if need is None:
        return None
    with progress.stage("training", detail=need.text):
        source: Any = path_in(need.text)
        if not need.text.startswith("tokens:"):
            source = load_texts(need.text, progress=progress)
            require_identity(source, text)
        training = training_windows(
            source, tokenizer, samples=need.samples, seqlen=need.seqlen, held_out=need.held_out,
            least=need.least, seed=spec.seed, vocabulary=vocabulary, bos=spec.calibration_bos,
            text_option=need.text_option, seqlen_option=need.seqlen_option,
        )  # fmt: skip
    return replace(
        training,
        folder=_folder(spec, recovers=recovers),
        title=f"{'distillation' if recovers else 'training'} of {spec.method} "
        f"{resolved.sparsity} on {spec.model}",
        code=code_sha256(resolved),
    )


def _folder(spec: RunSpec, *, recovers: bool) -> Path:
    # named by the spec: the same command finds the state of its interrupted training
    return _all_states() / f"{spec.spec_id}{'-recovery' if recovers else ''}"


def _all_states() -> Path:
    return cache_dir() / "training"


def saved_trainings(spec: RunSpec) -> list[TrainingInfo]:
    """Return what is saved of the trainings of a run."""
    infos = [training_info(_folder(spec, recovers=recovers)) for recovers in (False, True)]
    return [info for info in infos if info]


def unfinished_trainings() -> list[TrainingInfo]:
    """Return what is saved of all trainings, the newest first."""
    infos = [info for info in map(training_info, sorted(_all_states().glob("*"))) if info]
    return sorted(infos, key=lambda info: info.age_seconds)
