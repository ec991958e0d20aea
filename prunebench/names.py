"""The names in a spec, understood without reading or fetching anything but tables of ours.

Methods, options, models, texts, tasks: a wrong one is found here, in a recipe of a hundred cells
too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prunebench.allocators import ALLOCATORS
from prunebench.allocators.allocation import Allocator
from prunebench.calibration.texts import check_text_name
from prunebench.errors import UsageError
from prunebench.models.masks import require_masks_named
from prunebench.models.source import CatalogEntry, find_model
from prunebench.options import options_of
from prunebench.pruners import METHODS
from prunebench.pruners.layer import DependsOnModel, Pruner
from prunebench.sparsity import Sparsity
from prunebench.spec import RunSpec, Setup


@dataclass(frozen=True)
class Named:
    """A spec whose names have been understood, with nothing read or fetched.

    No allocator means that the ratios come from a file.
    """

    spec: RunSpec
    pruner: Pruner
    allocator: Allocator | None
    sparsity: Sparsity


def check_names(spec: RunSpec, setup: Setup) -> Named:
    """Fill in all options, and refuse unknown methods, options, models, texts and tasks.

    Raises:
        PrunebenchError: The first thing that is wrong.
    """
    entry = find_model(spec.model).entry
    spec, pruner, allocator, sparsity = _resolve_method(spec, entry)
    _check_texts(spec)
    if pruner.needs.training is not None:
        check_text_name(pruner.needs.training.text, use="calibration")
    if pruner.needs.masks is not None:
        require_masks_named(pruner.needs.masks)
    return Named(_check_tasks(spec, setup), pruner, allocator, sparsity)


def _resolve_method(
    spec: RunSpec, entry: CatalogEntry | None
) -> tuple[RunSpec, Pruner, Allocator | None, Sparsity]:
    """Fill in all options, and drop from the spec what is not read; no allocator means a file."""
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
    update: dict[str, Any] = {
        "method_options": options,
        "sparsity": str(sparsity),
        "allocation_options": allocation_options,
    }
    if not spec.ppl:
        update["ppl_bos"] = "text"
    allocator_reads = allocator is not None and allocator.needs.tokens
    if not pruner.needs.calibration:
        update["within_block"] = None
    if not (pruner.needs.tokens or allocator_reads):
        learns = pruner.needs.training is not None  # and its windows too begin as they should
        update |= {
            name: None if option.nullable else option.value
            for name, option in options_of(RunSpec).items()
            if option.about.role == "data" and not (learns and name == "calibration_bos")
        }
        if "seed" not in options:
            update["seed"] = 0
    return spec.model_copy(update=update), pruner, allocator, sparsity


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


def _check_tasks(spec: RunSpec, setup: Setup) -> RunSpec:
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
        return spec
    from prunebench.evaluate.tasks import check_task_names, expand_presets

    names = expand_presets(spec.tasks)
    check_task_names(names, setup.include_path)
    return spec.model_copy(update={"tasks": tuple(names)})
