"""`RunSpec`: everything that determines a result, and its hash. `Setup`: what changes no number."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from prunebench.errors import UsageError
from prunebench.progress import Progress, Silent

OptionValue = bool | int | float | str | None
Dtype = Literal["float32", "bfloat16", "float16"]
WithinBlock = Literal["joint", "sequential"]
Execute = Literal["dense", "sparse24"]
Bos = Literal["text", "window"]

DTYPES: tuple[str, ...] = get_args(Dtype)
AUTO = "auto"  # as a dtype: what suits the checkpoint and the device; no result is filed with it
_OrAuto = Annotated[
    Dtype | Literal["auto"], WithJsonSchema({"enum": list(DTYPES), "type": "string"})
]
ORDERS: tuple[str, ...] = get_args(WithinBlock)
EXECUTIONS: tuple[str, ...] = get_args(Execute)
BOS_PLACES: tuple[str, ...] = get_args(Bos)
BOS_WINDOW = "bos-window"  # part of a protocol's id where every window begins with BOS

# Where things are while a run works: no part of a spec, because they change no number.
Weights = Literal["resident", "disk"]
Placement = Literal["device", "cpu", "disk"]
WEIGHTS: tuple[str, ...] = (*get_args(Weights), "auto")
PLACEMENTS: tuple[str, ...] = get_args(Placement)


class RunSpec(BaseModel):
    """One run. Time, machine and file paths are not part of it.

    The fields that end in `_revision` and `_origin` are empty until the names beside them have
    been resolved to content (a commit, a SHA-256); only then does `spec_id` mean something. The
    same is true of the dtype `auto`.
    A method that reads no data has no calibration: those fields are then null.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    method: str
    method_options: dict[str, OptionValue] = {}
    model: str = "smollm2-135m-q4"
    model_revision: str = ""
    dtype: _OrAuto = "float32"
    sparsity: str = "0.5"
    allocation: str = "uniform"
    allocation_options: dict[str, OptionValue] = {}
    within_block: WithinBlock | None = "joint"
    calibration: str | None = "c4"
    calibration_origin: str | None = ""
    calibration_samples: int | None = Field(default=32, ge=1)
    seqlen: int | None = Field(default=512, ge=2)
    calibration_bos: Bos = "text"
    ppl: tuple[str, ...] = ("wiki",)
    ppl_origins: tuple[str, ...] = ()
    ppl_seqlen: int = Field(default=512, ge=2)
    ppl_tokens: int | None = Field(default=None, ge=2)
    ppl_bos: Bos = "text"
    divergence: bool = False
    tasks: tuple[str, ...] = ()
    num_fewshot: int | None = Field(default=None, ge=0)
    limit: int | None = Field(default=None, ge=1)
    apply_chat_template: bool = False
    execute: Execute = "dense"
    seed: int = Field(default=0, ge=0, lt=2**32)

    @property
    def spec_id(self) -> str:
        """The first 16 hex digits of the SHA-256 of the canonical JSON of this spec."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()[:16]

    def canonical_json(self) -> str:
        """Return JSON with sorted keys and no spaces: equal specs give equal bytes.

        Fields that came later are left out at their default, so that old hashes stay true.
        """
        fields = self.model_dump(mode="json")
        if self.allocation == "uniform" and not self.allocation_options:
            del fields["allocation"], fields["allocation_options"]
        later = (
            "divergence", "tasks", "num_fewshot", "limit", "apply_chat_template", "execute",
            "calibration_bos", "ppl_bos",
        )  # fmt: skip
        for name in later:
            if getattr(self, name) == RunSpec.model_fields[name].default:
                del fields[name]
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))

    @property
    def cell(self) -> str:
        """The name of the folder of this result below its model: method and sparsity."""
        return f"{slug(self.method)}-{self.sparsity.replace(':', 'of')}"

    @property
    def model_slug(self) -> str:
        """The model's name as a folder name."""
        return slug(self.model)


def slug(text: str) -> str:
    """Return `text` as a portable file name: letters, digits, dot, dash and underscore."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "unnamed"


def build_spec(values: Mapping[str, Any]) -> RunSpec:
    """Build a spec from option values.

    Raises:
        UsageError: A value is out of range or of the wrong kind; the option is named.
    """
    try:
        return RunSpec(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).replace("_", "-")
        raise UsageError(
            f"--{name} {first.get('input')!r} is not valid",
            where=str(first["msg"]),
            fix=f"see prunebench run --help for --{name}",
        ) from None


@dataclass(frozen=True)
class Setup:
    """Where a run happens and what it leaves: nothing here changes a number.

    Attributes:
        results_dir: Folder of the shared table.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        weights: Where they are: `resident`, `disk`, or `auto`.
        activations: Where hidden states wait between blocks that are read from disk.
        batch_size: Sequences that a task of lm-eval is asked at a time; None is what suits the
            device.
        include_path: Folder with more task files for lm-eval.
        backend: What multiplies by packed weights, with `execute` of the spec; None is the best.
        log_samples: Whether to file what came out for every document and window.
        save_model: Folder for the pruned checkpoint.
        save_masks: File for the keep masks.
        save_calibration: File for the calibration tokens.
        save_allocation: File for the ratio of every layer.
        replace: Whether those may replace what is there.
        command: The command line, for the record.
        progress: Hears of the stages.
    """

    results_dir: Path = Path("results")
    device: str = "auto"
    weights: str = "auto"
    activations: Placement = "device"
    batch_size: int | None = None
    include_path: Path | None = None
    backend: str | None = None
    log_samples: bool = False
    save_model: Path | None = None
    save_masks: Path | None = None
    save_calibration: Path | None = None
    save_allocation: Path | None = None
    replace: bool = False
    command: str = ""
    progress: Progress = field(default_factory=Silent)
