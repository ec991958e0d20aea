"""`RunSpec`: everything that determines a result, and its hash. `Setup`: what changes no number.

All that is known of a run option stands on its field: the type, the default, and an `Option` with
the rest. The command line, the environment, recipe keys, selectors, the settings of a table and
`--show-config` are derived from the fields by `options`.
"""

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
from prunebench.options import Option, options_of
from prunebench.progress import Progress, Silent

OptionValue = bool | int | float | str | None
Dtype = Literal["float32", "bfloat16", "float16"]
DtypeOrAuto = Literal["auto", "float32", "bfloat16", "float16"]
WithinBlock = Literal["joint", "sequential"]
Execute = Literal["dense", "sparse24"]
Bos = Literal["text", "window"]
Weights = Literal["resident", "disk"]
WeightsChoice = Literal["auto", "resident", "disk"]
Placement = Literal["device", "cpu", "disk"]

DTYPES: tuple[str, ...] = get_args(Dtype)
AUTO = "auto"  # as a dtype: what suits the checkpoint and the device; no result is filed with it
NO_RECOVERY = "none"  # as `recover`: the weights stay as the method leaves them
BOS_WINDOW = "bos-window"  # part of a protocol's id where every window begins with BOS


class RunSpec(BaseModel):
    """One run. Time, machine and file paths are not part of it.

    The fields that end in `_revision` and `_origin` are empty until the names beside them have
    been resolved to content (a commit, a SHA-256); only then does `spec_id` mean something. The
    same is true of the dtype `auto`.
    A method that reads no data has no calibration: those fields are then null.
    """

    # protected_namespaces: pydantic reserves names that begin with `model_`, and this spec has
    # `model_revision`
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    method: Annotated[
        str,
        Option(
            "Pruning method: a name of `prunebench list methods`, or module:Class.",
            cell=True, flags=("-m",),
        ),
    ]  # fmt: skip
    method_options: Annotated[
        dict[str, OptionValue], Option(given=False, cell=True, shown=True)
    ] = {}
    model: Annotated[
        str,
        Option(
            "Alias, org/name of the hub, folder, or .gguf file.", cell=True, flags=("-M",),
        ),
    ] = "smollm2-135m-q4"  # fmt: skip
    model_revision: Annotated[str, Option(given=False, cell=True, shown=True)] = ""
    dtype: Annotated[
        DtypeOrAuto,
        WithJsonSchema({"enum": list(DTYPES), "type": "string"}),
        Option(
            "float32, bfloat16, float16, or auto: the alias's, else the checkpoint's own where the "
            "device has it, else float32.", default=AUTO, cell=True, shown=True,
        ),
    ] = "float32"  # fmt: skip
    sparsity: Annotated[
        str,
        Option(
            "Ratio of zeros (0.5, 50%) or N:M, keep N of M (2:4).", default="the method's",
            cell=True, also=(float, int), repeated=True,
        ),
    ] = "0.5"  # fmt: skip
    allocation: Annotated[
        str,
        Option(
            "How a ratio is spread over the layers: a name of `prunebench list allocators`, or "
            "file:PATH.", default="the method's, mostly uniform", cell=True, shown=True,
        ),
    ] = "uniform"  # fmt: skip
    allocation_options: Annotated[
        dict[str, OptionValue], Option(given=False, cell=True, shown=True)
    ] = {}
    recover: Annotated[
        str,
        Option(
            "How the kept weights are trained after pruning, the zeros untouched: none, a name of "
            "`prunebench list recoverers`, module:Class, or two that follow, block+distill.",
            cell=True, shown=True, since=2,
        ),
    ] = NO_RECOVERY  # fmt: skip
    recover_options: Annotated[
        dict[str, OptionValue], Option(given=False, cell=True, shown=True, since=2)
    ] = {}
    within_block: Annotated[
        WithinBlock | None,
        Option(
            "joint: all layers of a block see the dense block's inputs, as in the papers; "
            "sequential: each sees the inputs left by those before it.", cell=True, shown=True,
        ),
    ] = "joint"  # fmt: skip
    calibration: Annotated[
        str | None,
        Option("Text name, file:PATH, or tokens:PATH.", role="data", cell=True, shown=True),
    ] = "c4"
    calibration_origin: Annotated[str | None, Option(role="data", given=False, cell=True)] = ""
    calibration_samples: Annotated[
        int | None,
        Field(ge=1),
        Option("Number of calibration windows.", role="data", cell=True, shown=True),
    ] = 32
    seqlen: Annotated[
        int | None,
        Field(ge=2),
        Option("Tokens in a calibration window.", role="data", cell=True, shown=True),
    ] = 512
    calibration_bos: Annotated[
        Bos,
        Option(
            "text: the token that begins a text (BOS) stands where the tokenizer puts it; "
            "window: every calibration or training window begins with it.",
            role="data", default="text; window for Gemma's aliases", cell=True, shown=True, since=2,
        ),
    ] = "text"  # fmt: skip
    ppl: Annotated[
        tuple[str, ...],
        Option(
            "Texts for perplexity, split by commas: a name, wikitext2:PATH, file:PATH, "
            "tokens:PATH.", role="evaluation",
        ),
    ] = ("wiki",)  # fmt: skip
    ppl_origins: Annotated[tuple[str, ...], Option(role="evaluation", given=False)] = ()
    ppl_seqlen: Annotated[
        int, Field(ge=2), Option("Tokens in a perplexity window.", role="evaluation")
    ] = 512
    ppl_tokens: Annotated[
        int | None,
        Field(ge=2),
        Option(
            "Score only the first so many tokens; such rows are kept apart.", role="evaluation",
            default="all",
        ),
    ] = None  # fmt: skip
    ppl_bos: Annotated[
        Bos,
        Option(
            "text: BOS once, before the first window, as the papers have it; window: every window "
            "begins with it, as Gemma needs; a protocol of its own.", role="evaluation",
            default="text; window for Gemma's aliases", since=2,
        ),
    ] = "text"  # fmt: skip
    divergence: Annotated[
        bool,
        Option(
            "Also compare the next-token distributions on the texts with the dense model's: KL "
            "divergence and share of changed first choices.", role="evaluation", since=2,
            requires="ppl",
        ),
    ] = False  # fmt: skip
    tasks: Annotated[
        tuple[str, ...],
        Option(
            "Tasks or groups of lm-eval, split by commas, or the list of a paper: wanda7, "
            "maskllm7, gblm6.", role="evaluation", since=2,
        ),
    ] = ()  # fmt: skip
    tasks_origin: Annotated[str, Option(role="evaluation", given=False, since=2)] = ""
    num_fewshot: Annotated[
        int | None,
        Field(ge=0),
        Option(
            "Examples before each question of a task.", role="evaluation", default="the task's",
            since=2, requires="tasks",
        ),
    ] = None  # fmt: skip
    limit: Annotated[
        int | None,
        Field(ge=1),
        Option(
            "Ask only the first so many documents of each task; such rows are kept apart.",
            role="evaluation", since=2, requires="tasks",
        ),
    ] = None  # fmt: skip
    apply_chat_template: Annotated[
        bool,
        Option(
            "Ask tasks in the tokenizer's chat template.", role="evaluation", since=2,
            requires="tasks",
        ),
    ] = False  # fmt: skip
    execute: Annotated[
        Execute,
        Option(
            "dense, or sparse24: score the pruned 2:4 model with packed weights.",
            role="evaluation", cell=True, shown=True, since=2,
        ),
    ] = "dense"  # fmt: skip
    seed: Annotated[int, Field(ge=0, lt=2**32), Option("Seed of sampling and of the method.")] = 0

    @property
    def spec_id(self) -> str:
        """The first 16 hex digits of the SHA-256 of the canonical JSON of this spec."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()[:16]

    def canonical_json(self) -> str:
        """Return JSON with sorted keys and no spaces: equal specs give equal bytes.

        Fields that came later are left out at their default, so that old hashes stay true.
        """
        values = self.model_dump(mode="json")
        if self.allocation == "uniform" and not self.allocation_options:
            del values["allocation"], values["allocation_options"]
        # a new option at its default computes what the old version did: the hash stays the same
        for name, option in options_of(type(self)).items():
            if option.about.since > 1 and getattr(self, name) == option.value:
                del values[name]
        return json.dumps(values, sort_keys=True, separators=(",", ":"))

    @property
    def cell(self) -> str:
        """The name of the folder of this result below its model: method and sparsity."""
        # a colon is no valid character in a Windows file name: 2:4 becomes 2of4
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

    `command` is the command line, for the record; `progress` is called with the stages.
    """

    results_dir: Annotated[
        Path, Option("Folder of the shared table.", role="output", recipe=False)
    ] = Path("results")
    device: Annotated[
        str,
        Option(
            "auto, cpu, cuda or cuda:N; cuda:0,cuda:1: calibration on several GPUs.",
            role="placement",
        ),
    ] = "auto"
    weights: Annotated[
        WeightsChoice,
        Option(
            "resident: in memory; disk: read a block at a time, and resume after a kill; auto: in "
            "memory if they fit. The result is the same.", role="placement",
        ),
    ] = "auto"  # fmt: skip
    activations: Annotated[
        Placement,
        Option(
            "Where hidden states wait between blocks that are on disk: device, cpu, disk.",
            role="placement",
        ),
    ] = "device"
    batch_size: Annotated[
        int | None,
        Field(ge=1),
        Option(
            "Sequences of a task at a time; with 1 each choice is run by itself, as lm-eval does.",
            role="placement", recipe=False, requires="tasks", default="what the device runs well",
        ),
    ] = None  # fmt: skip
    include_path: Annotated[
        Path | None,
        Option(
            "Folder with more task files for lm-eval.", role="placement", recipe=False,
            metavar="DIR", requires="tasks",
        ),
    ] = None  # fmt: skip
    backend: Annotated[
        str | None,
        Option(
            "What multiplies with --execute sparse24: triton, cslt, cpu, decompress or reference.",
            role="placement", recipe=False, default="the fastest measured here",
        ),
    ] = None  # fmt: skip
    log_samples: Annotated[
        bool,
        Option(
            "File what came out for every document and window beside the result, for compare "
            "--paired.", role="output", env=False, recipe=False,
        ),
    ] = False  # fmt: skip
    log_text: Annotated[
        int,
        Field(ge=0),
        Option(
            "Keep what the dense and the pruned model write after so many fixed prompts in the "
            "result, for the report and the model card.", role="output",
        ),
    ] = 0  # fmt: skip
    save_model: Annotated[
        Path | None,
        Option(
            "Write the pruned model, zeros in place.", role="output", env=False, recipe=False,
            metavar="DIR",
        ),
    ] = None  # fmt: skip
    save_masks: Annotated[
        Path | None,
        Option(
            "Write the keep masks (.npz, packed bits).", role="output", env=False, recipe=False,
            metavar="FILE",
        ),
    ] = None  # fmt: skip
    save_calibration: Annotated[
        Path | None,
        Option(
            "Write the calibration tokens (.safetensors), for tokens:PATH.", role="output",
            env=False, recipe=False, metavar="FILE", requires="calibration",
        ),
    ] = None  # fmt: skip
    save_allocation: Annotated[
        Path | None,
        Option(
            "Write the ratio of every layer (.json), for --allocation file:FILE.", role="output",
            env=False, recipe=False, metavar="FILE",
        ),
    ] = None  # fmt: skip
    force: Annotated[
        bool, Option("Replace what --save-* finds there.", role="output", env=False, recipe=False)
    ] = False
    command: str = ""
    progress: Progress = field(default_factory=Silent)
