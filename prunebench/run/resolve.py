"""From a spec of names to a spec of contents: cheap, and all that a spec's identity needs.

    resolved = resolve(spec, setup)     # resolved.spec.spec_id is that of the result to come

Methods, options, models, texts and tasks are names in tables of ours; a model is fetched if it is
not here; a text, a mask or a file of ratios is named by its origin or its hash. Nothing is
tokenized and no model is built: `plan.load_inputs` does that, for a spec that has no result yet.
Every step returns the fields that it fills in; they are applied once.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prunebench.allocators import ALLOCATORS
from prunebench.allocators.allocation import Allocator
from prunebench.calibration.texts import TextIdentity, check_text_name, identify_text, placed
from prunebench.calibration.windows import load_windows
from prunebench.checkpoints.fp8 import is_fp8
from prunebench.checkpoints.packed24 import unpacked
from prunebench.checkpoints.save import check_target
from prunebench.errors import UsageError
from prunebench.evaluate.perplexity import count_windows, protocol_of
from prunebench.files import cache_dir, require_writable, sha256_file
from prunebench.models.device import choose_devices
from prunebench.models.load import load_tokenizer
from prunebench.models.masks import masks_origin, require_masks_named
from prunebench.models.source import CatalogEntry, LocalModel, fetch_model, find_model
from prunebench.options import options_of
from prunebench.progress import StageTimer
from prunebench.pruners import METHODS
from prunebench.pruners.protocol import DependsOnModel, Pruner
from prunebench.results.store import ResultStore
from prunebench.run.dtype import DtypeChoice, StoredDtype, choose_dtype
from prunebench.sparse24.backends.table import require_backend
from prunebench.sparsity import Sparsity
from prunebench.spec import RunSpec, Setup

Fields = dict[str, Any]
"""Fields of a spec that a step fills in."""


@dataclass(frozen=True)
class NamedSpec:
    """A spec whose names are known, with nothing read or fetched.

    No allocator means that the ratios come from a file.
    """

    spec: RunSpec
    pruner: Pruner
    allocator: Allocator | None
    sparsity: Sparsity


@dataclass(frozen=True)
class ResolvedSpec:
    """A spec whose names have become contents.

    Attributes:
        spec: With revisions, origins, hashes and all options: its `spec_id` is that of the result.
        named: The spec with names, which say where the contents are.
        setup: Where the run happens.
        store: The results folder.
        clock: Called with the stages.
        devices: Run calibration batches in turn; all else is done on the first.
        model: The folder of the weights.
        dtype: Why the weights are read in the dtype of the spec.
        pruner: The method with its options.
        allocator: What spreads the sparsity over the layers; None where a file does.
        sparsity: The target.
        calibration_text: What is calibrated on, if it is a text and not a file of tokens.
        training_text: Name and origin of what a method learns from.
        started: `time.perf_counter()` at the beginning.
    """

    spec: RunSpec
    named: RunSpec
    setup: Setup
    store: ResultStore
    clock: StageTimer
    devices: tuple[torch.device, ...]
    model: LocalModel
    dtype: DtypeChoice
    pruner: Pruner
    allocator: Allocator | None
    sparsity: Sparsity
    calibration_text: TextIdentity | None
    training_text: TextIdentity | None
    started: float

    @property
    def device(self) -> torch.device:
        """The device that holds the model."""
        return self.devices[0]


def resolve(spec: RunSpec, setup: Setup) -> ResolvedSpec:
    """Resolve every name to its content, and check what needs no tokens.

    Raises:
        PrunebenchError: The first thing that is wrong.
    """
    started = time.perf_counter()
    clock = StageTimer(setup.progress)
    with clock.stage("check", detail=f"{spec.method} on {spec.model}"):
        source = find_model(spec.model)
        named = check_names(_place_texts(spec, source.kind), setup)
        devices = choose_devices(setup.device)
        _require_one_device(named, devices)
        check_packed(named.spec, named.sparsity, backend=setup.backend, device=devices[0])
        store = ResultStore(setup.results_dir)
        store.require_writable(named.spec)
        require_writable(cache_dir())
        require_outputs(setup, need_model_bytes=1 << 20)
    fetched = fetch_model(source, clock)
    model = unpacked(fetched, clock)
    dtype = choose_dtype(
        named.spec.dtype,
        source,
        model.path,
        devices[0],
        saves=setup.save_model is not None,
        # the dense copy of an FP8 checkpoint is float32, and the model is not
        stored=StoredDtype.of(fetched.path) if is_fp8(fetched.path) else None,
    )
    calibration, calibration_fields = _identify_calibration(named.spec)
    training_text, training_fields = _identify_training(named)
    fields: Fields = {
        "model": source.id,
        "model_revision": model.revision,
        "dtype": dtype.dtype,
        **_identify_allocation(named.spec),
        **_identify_masks(named, clock),
        **calibration_fields,
        **_identify_ppl(named.spec, model, clock),
    }
    if training_fields:
        options = fields.get("method_options", named.spec.method_options)
        fields["method_options"] = {**options, **training_fields}
    resolved = named.spec.model_copy(update=fields)
    check_packed(resolved, named.sparsity, backend=setup.backend, device=devices[0])
    _require_unseen(resolved, training_text)
    return ResolvedSpec(
        spec=resolved,
        named=named.spec,
        setup=setup,
        store=store,
        clock=clock,
        devices=devices,
        model=model,
        dtype=dtype,
        pruner=named.pruner,
        allocator=named.allocator,
        sparsity=named.sparsity,
        calibration_text=calibration,
        training_text=training_text,
        started=started,
    )


# ---------------------------------------------------------------- names


def check_names(spec: RunSpec, setup: Setup) -> NamedSpec:
    """Fill in all options, and refuse unknown methods, options, models, texts and tasks.

    Raises:
        PrunebenchError: The first thing that is wrong.
    """
    entry = find_model(spec.model).entry
    pruner, allocator, sparsity, fields = _resolve_method(spec, entry)
    _check_texts(spec.model_copy(update=fields))
    if pruner.needs.training is not None:
        check_text_name(pruner.needs.training.text, use="calibration")
    if pruner.needs.masks is not None:
        require_masks_named(pruner.needs.masks)
    fields |= _check_tasks(spec, setup)
    return NamedSpec(spec.model_copy(update=fields), pruner, allocator, sparsity)


def _resolve_method(
    spec: RunSpec, entry: CatalogEntry | None
) -> tuple[Pruner, Allocator | None, Sparsity, Fields]:
    """Fill in all options, and drop what is not read; no allocator means a file."""
    row = METHODS.find(spec.method)
    options = METHODS.resolve_options(spec.method, spec.method_options, seed=spec.seed)
    pruner = METHODS.make(spec.method, options)
    sparsity = Sparsity.parse(spec.sparsity)
    if isinstance(pruner, DependsOnModel):
        pruner = pruner.for_model(entry, spec.calibration)
        pruner.check(sparsity)
        options = pruner.options()
    if not row.prunes and sparsity.ratio != 0:
        raise UsageError(
            f"the method {spec.method} does not prune", fix="leave --sparsity out, or use 0"
        )
    if spec.allocation != "uniform" and (sparsity.is_pattern or not row.prunes):
        raise UsageError(
            f"--allocation {spec.allocation} does not go with {spec.method} {sparsity}",
            where="N:M keeps N of every M in all layers alike: there is nothing to spread",
            fix=f"use a ratio such as --sparsity {sparsity.ratio or 0.5:g}, or "
            "--allocation uniform",
        )
    allocator, allocation_options = _resolve_allocator(spec)
    fields: Fields = {
        "method_options": options,
        "sparsity": str(sparsity),
        "allocation_options": allocation_options,
    }
    if not spec.ppl:
        fields["ppl_bos"] = "text"
    allocator_reads = allocator is not None and allocator.needs.tokens
    if not pruner.needs.calibration:
        fields["within_block"] = None
    if not (pruner.needs.tokens or allocator_reads):
        learns = pruner.needs.training is not None  # and its windows too begin as they should
        fields |= {
            name: None if option.nullable else option.value
            for name, option in options_of(RunSpec).items()
            if option.about.role == "data" and not (learns and name == "calibration_bos")
        }
        if "seed" not in options:
            fields["seed"] = 0
    return pruner, allocator, sparsity, fields


def _resolve_allocator(spec: RunSpec) -> tuple[Allocator | None, dict[str, Any]]:
    name = spec.allocation
    if name.startswith("file:"):
        if spec.allocation_options:
            raise UsageError("an allocation file has no options", fix="leave --set allocation. out")
        return None, {}
    options = ALLOCATORS.resolve_options(name, spec.allocation_options, seed=spec.seed)
    allocator: Allocator = ALLOCATORS.make(name, options)
    allocator.check(Sparsity.parse(spec.sparsity).ratio)
    return allocator, options


def _check_texts(spec: RunSpec) -> None:
    if spec.calibration is not None:
        check_text_name(spec.calibration, use="calibration")
    for name in spec.ppl:
        check_text_name(name, use="evaluation")
    if len(set(spec.ppl)) < len(spec.ppl):
        raise UsageError(f"--ppl names a text twice: {', '.join(spec.ppl)}")


def _check_tasks(spec: RunSpec, setup: Setup) -> Fields:
    """Expand the papers' lists of tasks, and refuse names that lm-eval does not know."""
    if not spec.tasks:
        values = {**dict(spec), **vars(setup)}
        given = [
            option.flag
            for name, option in options_of(RunSpec, Setup).items()
            if option.about.requires == "tasks" and values[name] != option.value
        ]
        if given:
            raise UsageError(f"{given[0]} goes with --tasks", fix="as in --tasks piqa,arc_easy")
        return {}
    from prunebench.evaluate.tasks import check_task_names, expand_presets

    names = expand_presets(spec.tasks)
    check_task_names(names, setup.include_path)
    return {"tasks": tuple(names)}


def _place_texts(spec: RunSpec, kind: str) -> RunSpec:
    """Decide where the texts come from, before anything is asked of the network."""
    calibration = spec.calibration and placed(spec.calibration, model=kind)
    ppl = tuple(placed(name, model=kind) for name in spec.ppl)
    options = dict(spec.method_options)
    if isinstance(options.get("train_data"), str):
        options["train_data"] = placed(str(options["train_data"]), model=kind)
    fields = {"calibration": calibration, "ppl": ppl, "method_options": options}
    return spec.model_copy(update=fields)


# ---------------------------------------------------------------- contents


def _identify_calibration(spec: RunSpec) -> tuple[TextIdentity | None, Fields]:
    name = spec.calibration
    if name is None:
        return None, {}
    if name.startswith("tokens:"):
        windows = load_windows(path_in(name))
        samples, seqlen = windows.token_ids.shape
        fields = {"calibration": "tokens", "calibration_origin": f"sha256:{windows.sha256}"}
        return None, {**fields, "calibration_samples": samples, "seqlen": seqlen}
    text = identify_text(name, use="calibration")
    return text, {"calibration": text.name, "calibration_origin": text.origin}


def _identify_training(named: NamedSpec) -> tuple[TextIdentity | None, Fields]:
    need = named.pruner.needs.training
    if need is None:
        return None, {}
    if need.text.startswith("tokens:"):
        digest = sha256_file(path_in(need.text))
        text = TextIdentity(f"tokens-{digest[:12]}", "all", f"sha256:{digest}")
    else:
        text = identify_text(need.text, use="calibration")
    return text, {"train_data": text.name}


def _identify_ppl(spec: RunSpec, model: LocalModel, clock: StageTimer) -> Fields:
    protocols, origins = [], []
    for name in spec.ppl:
        tokens = None
        if name.startswith("tokens:"):
            windows = load_windows(path_in(name))
            digest, seqlen = windows.sha256, windows.token_ids.shape[1]
            text = TextIdentity(f"tokens-{digest[:12]}", "all", f"sha256:{digest}")
            tokens = windows.token_ids.numel()
        else:
            text, seqlen = identify_text(name, use="evaluation"), spec.ppl_seqlen
            if spec.ppl_tokens is not None:  # whether the text has more is part of the protocol
                tokenizer = load_tokenizer(model.path)
                count = count_windows(
                    name, tokenizer, seqlen=seqlen, bos=spec.ppl_bos, progress=clock
                )
                tokens = count * seqlen
        protocols.append(
            protocol_of(text, seqlen=seqlen, bos=spec.ppl_bos, tokens=tokens, limit=spec.ppl_tokens)
        )
        origins.append(text.origin)
    return {"ppl": tuple(protocols), "ppl_origins": tuple(origins)}


def _identify_allocation(spec: RunSpec) -> Fields:
    """Name the content of `file:PATH`, not the path."""
    if not spec.allocation.startswith("file:"):
        return {}
    path = path_in(spec.allocation)
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(f"cannot read the allocation {path}", where=str(error.strerror)) from None
    return {"allocation": "file", "allocation_options": {"sha256": digest}}


def _identify_masks(named: NamedSpec, clock: StageTimer) -> Fields:
    name = named.pruner.needs.masks
    if name is None:
        return {}
    with clock.stage("masks", detail=name):
        origin = masks_origin(name, clock)
    options = named.spec.method_options
    return {"method_options": {k: origin if v == name else v for k, v in options.items()}}


def path_in(name: str) -> Path:
    """Return the path of a name such as `tokens:PATH` or `file:PATH`."""
    return Path(name.partition(":")[2]).expanduser()


# ---------------------------------------------------------------- what does not go together


def _require_one_device(named: NamedSpec, devices: tuple[torch.device, ...]) -> None:
    if len(devices) > 1 and named.pruner.needs.training is not None:
        raise UsageError(
            f"{named.spec.method} does not learn on several --device of one process",
            fix=f"torchrun --nproc-per-node {len(devices)} -m prunebench run ...",
        )


def _require_unseen(spec: RunSpec, training_text: TextIdentity | None) -> None:
    """Refuse to score a text that was calibrated on or learned from."""
    scored = {origin for origin in spec.ppl_origins if origin.startswith("sha256:")}
    if spec.calibration_origin in scored:
        raise UsageError(
            f"{spec.calibration} is calibrated on and evaluated on",
            where="a score on the calibration text says nothing",
            fix="use another text for --calibration or for --ppl",
        )
    if training_text is not None and training_text.origin in scored:
        raise UsageError(
            "one text is learned from and evaluated on",
            where="a score on the training text says nothing",
            fix="use another text for --set train_data or for --ppl",
        )


def require_outputs(setup: Setup, *, need_model_bytes: int) -> None:
    """Refuse targets of --save-* that cannot be written.

    Raises:
        UsageError: Something is there already.
        SaveError: It cannot be written, or there is too little space.
    """
    folder, replace = setup.save_model, setup.force
    if folder:
        check_target(folder, need_bytes=need_model_bytes, replace=replace, folder=True)
    for file in filter(None, (setup.save_masks, setup.save_calibration, setup.save_allocation)):
        check_target(file, need_bytes=1 << 20, replace=replace, folder=False)


def check_packed(
    spec: RunSpec, sparsity: Sparsity, *, backend: str | None, device: torch.device
) -> None:
    """Refuse `execute = sparse24` where it cannot be.

    Raises:
        UsageError: The sparsity is no 2:4, the dtype has 32 bits, or the backend cannot be used.
    """
    if spec.execute == "dense":
        if backend is not None:
            raise UsageError(
                f"--backend {backend} goes with --execute sparse24", fix="add --execute sparse24"
            )
        return
    if sparsity.ratio != 0 and not implies_24(sparsity):
        raise UsageError(
            f"--execute sparse24 does not go with --sparsity {sparsity}",
            where="packed weights keep at most 2 of every 4",
            fix="use --sparsity 2:4",
        )
    if spec.dtype == "float32":
        raise UsageError(
            "--execute sparse24 does not go with --dtype float32",
            where="2:4 is packed in 16 bits: no sparse tensor core takes float32",
            fix="use --dtype bfloat16",
        )
    if backend is not None:
        require_backend(backend, device)


def implies_24(sparsity: Sparsity) -> bool:
    """Whether N:M keeps at most 2 of every 4 inputs: 2:4, 1:4 and 1:2 do."""
    return (sparsity.kept, sparsity.group) in ((2, 4), (1, 4), (1, 2))
