"""`prunebench.prune`: prune a model that the caller holds, as a run prunes what it loads."""

from __future__ import annotations

import contextlib
import inspect
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from prunebench.api.given import text_name, token_ids_of
from prunebench.api.models import usable_model
from prunebench.errors import PrunebenchError, UsageError, nearest
from prunebench.progress import Progress, Silent, quiet_libraries
from prunebench.results.recovery_schema import RecoveryBlock
from prunebench.results.schema import (
    AllocationBlock,
    CalibrationBlock,
    LayerSparsity,
    MethodBlock,
    MethodEvent,
    SparsityBlock,
    TrainingBlock,
)
from prunebench.run.failures import memory_errors, record_halvings
from prunebench.run.held import HeldPlan, model_is, plan_for_model
from prunebench.run.pruning import Pruned, prune_model
from prunebench.run.result import (
    build_allocation_block,
    build_method_block,
    build_recovery_block,
    build_sparsity_block,
    build_training_block,
)
from prunebench.run_options import RUN_OPTIONS, spec_of, with_defaults
from prunebench.spec import RunSpec

if TYPE_CHECKING:
    import pandas as pd

_OPTIONS = {
    name: option
    for name, option in RUN_OPTIONS.items()
    if option.about.role in ("method", "data") and name not in ("model", "dtype")
}


@dataclass(frozen=True, repr=False)
class PruningReport:
    """What `prune` did, all of it measured on the weights.

    Attributes:
        spec: The run as it was resolved: every option, and every name replaced by its content.
            Its `model_revision` is the hash of the weights before pruning.
        sparsity: Realised ratio, and requested sparsity, zeros and loss of every layer; the blocks
            that are gone, for a method that removes blocks.
        method: Implementation, version, options and events.
        calibration: Source and hash of the calibration tokens; None for a method without data.
        allocation: How the ratio was spread over the layers; None if it is uniform.
        training: Curve and text of a method that learns, else None.
        recovery: What was trained after pruning, block by block; None without `recover`.
        dense_sha256: Hash of the weights before (name, dtype, shape and bytes of every parameter).
        weights_sha256: The same hash afterwards, `evaluated_sha256` in the result of a run.
        zeros_before: Zeros among the prunable weights before.
        seconds: Of allocator and method; reading texts, hashing and checking are not in it.
        stage_seconds: Seconds of every stage, by name.
        notes: What a run prints on its way.
        halved_batches: Batches that ran out of memory and were halved.
    """

    spec: RunSpec
    sparsity: SparsityBlock
    method: MethodBlock
    calibration: CalibrationBlock | None
    allocation: AllocationBlock | None
    training: TrainingBlock | None
    recovery: RecoveryBlock | None
    dense_sha256: str
    weights_sha256: str
    zeros_before: int
    seconds: float
    stage_seconds: dict[str, float]
    notes: tuple[str, ...]
    halved_batches: tuple[str, ...]

    @property
    def realised_ratio(self) -> float:
        """Zeros among the prunable weights, in [0, 1)."""
        return self.sparsity.realised_ratio

    @property
    def layers(self) -> list[LayerSparsity]:
        """Name, shape, requested sparsity, zeros and loss of every layer, in the model's order."""
        return self.sparsity.layers

    @property
    def events(self) -> list[MethodEvent]:
        """What the method had to work around, by layer; empty if nothing."""
        return self.method.events

    def to_frame(self) -> pd.DataFrame:
        """Return one row a layer: its name, shape, requested sparsity, zeros, ratio, loss."""
        import pandas as pd

        frame = pd.DataFrame([layer.model_dump() for layer in self.layers])
        frame["ratio"] = frame["zeros"] / (frame["out_features"] * frame["in_features"])
        return frame

    def __repr__(self) -> str:
        size = sum(layer.out_features * layer.in_features for layer in self.layers)
        zeros = sum(layer.zeros for layer in self.layers)
        kinds: dict[str, int] = {}
        for event in self.events:
            kinds[event.kind] = kinds.get(event.kind, 0) + 1
        events = [f"{kind} in {count} layers" for kind, count in kinds.items()]
        lines = {
            "zeros": f"{zeros:,} of {size:,} ({self.realised_ratio:.3%})",
            "layers": f"{len(self.layers)}",
            "before": f"{self.zeros_before:,} ({self.zeros_before / size:.3%})",
            "seconds": f"{self.seconds:.2f}",
            "events": ", ".join(events) or "none",
            "weights": f"sha256 {self.weights_sha256[:16]}...",
        }
        removal = self.sparsity.removal
        if removal:
            numbers = ", ".join(map(str, sorted(removal.blocks))) or "none"
            lines["removed"] = f"blocks {numbers} of {removal.blocks_before}"
        if self.halved_batches:
            lines["memory"] = ", ".join(self.halved_batches)
        title = f"PruningReport: {self.spec.method} {self.spec.sparsity} on {self.spec.model}"
        rows = [f"  {name:8} {text}" for name, text in lines.items()]
        return "\n".join([title, *rows, *(f"  note     {note.strip()}" for note in self.notes)])


def prune(
    model: nn.Module,
    tokenizer: Any = None,
    *,
    method: str | type,
    sparsity: str | float | None = None,
    calibration: Any = None,
    method_options: dict[str, Any] | None = None,
    allocation_options: dict[str, Any] | None = None,
    recover_options: dict[str, Any] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> PruningReport:
    """Prune a model in place, as `prunebench run` prunes the one that it loads.

    The walk, the checks and the hashes are those of a run: the same weights come out bit for bit.
    Training mode and `requires_grad` are restored; embeddings, norms and head are not touched.

    Args:
        model: A causal language model of transformers, on one device, unquantized, in float32,
            bfloat16 or float16.
        tokenizer: Of the model; may be None if no text is read.
        method: A name of `prunebench list methods`, `module:Class`, or a class of your own, see
            `prunebench.plugin`.
        sparsity: Share of zeros in [0, 1), or N:M (keep N of every M inputs); by default the
            method's.
        calibration: A name of `prunebench list texts`, `file:PATH`, `tokens:PATH`, a text, a list
            of texts, or token ids, integers [windows, seqlen]; by default c4. A string without
            white space is a name.
        method_options: Options of the method, as `--set` takes them.
        allocation_options: Options of the allocator.
        recover_options: Options of the recovery.
        progress: Called with the stages; by default nothing is shown.
        **options: Further options of `prunebench run` by their names, e.g.
            `calibration_samples=128, seqlen=2048, within_block="sequential", seed=1`.

    Returns:
        What was done, measured on the weights.

    Raises:
        UsageError: An option is unknown or out of range. The model is unchanged.
        MissingResource: A text cannot be had. The model is unchanged.
        IncompatibleData: The model or the text cannot be used; if activations turn out not to be
            finite, blocks before may be pruned already.
        CheckFailed: The weights do not have the sparsity that was asked for: load them again.
        OutOfMemory: The last line of the message says whether weights have changed, here and for
            every other error after the first checks.

    Example:
        >>> import prunebench
        >>> from prunebench.testing import tiny_model, tiny_tokens
        >>> model = tiny_model("llama")
        >>> report = prunebench.prune(
        ...     model, method="wanda", sparsity="2:4", calibration=tiny_tokens()
        ... )
        >>> report.realised_ratio, len(report.layers), report.events
        (0.5, 21, [])
        >>> report.to_frame()[["requested", "ratio"]].drop_duplicates().values.tolist()
        [['2:4', 0.5]]
        >>> prunebench.prune(model, method="magnitude", sparsity="2:5")
        Traceback (most recent call last):
            ...
        prunebench.errors.IncompatibleData: sparsity 2:5 does not fit ...
    """
    unknown = sorted(options.keys() - _OPTIONS.keys())
    if unknown:
        raise UsageError(f"prune has no option {unknown[0]!r}", fix=nearest(unknown[0], _OPTIONS))
    given = {"method": _method_name(method), **options}
    given |= {} if sparsity is None else {"sparsity": sparsity}
    notes = _Notes(progress or Silent())
    with (
        tempfile.TemporaryDirectory(prefix="prunebench-") as folder,
        quiet_libraries(),
        usable_model(model),
    ):
        if calibration is not None:
            given["calibration"] = _calibration_name(calibration, Path(folder), options)
        # as the tables [set], [set.allocation] and [set.recover] of a recipe
        nested = {"allocation": allocation_options, "recover": recover_options}
        tables = {name: table for name, table in nested.items() if table}
        spec = spec_of(with_defaults({**given, "set": {**(method_options or {}), **tables}}))
        held = plan_for_model(model, tokenizer, spec, notes)
        halvings: list[str] = []
        with (
            _state_of(model, held.sha256),
            memory_errors(held.plan.device, held.plan),
            record_halvings(held.plan, halvings),
        ):
            pruned = prune_model(held.plan, model, held.plan.linears, held.zeros)
    for training in held.plan.trainings:
        training.forget()
    return _report(held, pruned, notes.texts, halvings)


def _report(held: HeldPlan, pruned: Pruned, notes: list[str], halvings: list[str]) -> PruningReport:
    plan, report = held.plan, pruned.report
    return PruningReport(
        spec=plan.spec,
        sparsity=build_sparsity_block(plan, pruned.measured, report, pruned.allocation),
        method=build_method_block(plan.spec, report),
        calibration=plan.calibration,
        allocation=build_allocation_block(plan.spec, pruned.allocation),
        training=build_training_block(plan, report),
        recovery=build_recovery_block(plan, pruned.recovered, pruned.trained),
        dense_sha256=held.sha256,
        weights_sha256=pruned.sha256,
        zeros_before=sum(held.zeros.values()),
        seconds=pruned.seconds,
        stage_seconds=dict(plan.progress.seconds),
        notes=tuple(notes),
        halved_batches=tuple(halvings),
    )


@contextlib.contextmanager
def _state_of(model: nn.Module, sha256: str) -> Iterator[None]:
    """Add to any error, Ctrl-C too, whether the weights have changed."""
    try:
        yield
    except BaseException as error:
        state = {
            True: "the model is unchanged",
            False: "the model is partly pruned: load it again",
            None: "the state of the model is unknown: load it again",
        }[model_is(model, sha256)]
        if isinstance(error, PrunebenchError):
            error.fix = f"{error.fix}; {state}" if error.fix else state
        else:
            error.add_note(state)
        raise


class _Notes:
    """A `Progress` that forwards to another one and collects the notes."""

    def __init__(self, progress: Progress) -> None:
        self.stage = progress.stage
        self.texts: list[str] = []
        self._progress = progress

    def note(self, text: str) -> None:
        """Collect and forward a note."""
        self.texts.append(text)
        self._progress.note(text)


# ---------------------------------------------------------------- texts


def _method_name(method: str | type) -> str:
    """Return the name of a method; that of a class is `module:Class`."""
    if isinstance(method, str):
        return method
    name = getattr(method, "__qualname__", None)
    if not isinstance(method, type) or name is None or "." in name:
        raise UsageError(
            f"{name or type(method).__name__} is no name and no class of a module",
            where="a result names its method as module:Class",
            fix="define the class at the top of a module or of a notebook cell",
        )
    return f"{method.__module__}:{name}"


def _calibration_name(calibration: Any, folder: Path, options: dict[str, Any]) -> str:
    name = text_name(calibration, folder)
    if name.startswith("tokens:") and not isinstance(calibration, str):
        rows, width = token_ids_of(calibration).shape  # [windows, seqlen]
        for option, size in (("calibration_samples", rows), ("seqlen", width)):
            if options.get(option, size) != size:
                raise UsageError(
                    f"{option}={options[option]}, and the token ids are [{rows}, {width}]",
                    fix=f"leave {option} out, or slice the token ids",
                )
    return name


# ---------------------------------------------------------------- the signature


def _signature() -> inspect.Signature:
    """Return `prune`'s signature with every option of a run by name, for help() and notebooks."""
    signature = inspect.signature(prune)
    *declared, _ = signature.parameters.values()
    names = {parameter.name for parameter in declared}
    derived = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=option.value,
            annotation=option.kind | None if option.nullable else option.kind,
        )
        for name, option in _OPTIONS.items()
        if name not in names
    ]  # fmt: skip
    return signature.replace(parameters=[*declared, *derived])


prune.__signature__ = _signature()  # type: ignore[attr-defined]
