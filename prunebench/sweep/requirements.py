"""What the cells of a recipe need on the machine: a GPU, the hub, a login."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prunebench.download.hub import hub_problem, hub_reachable
from prunebench.errors import MissingResource
from prunebench.models.source import ModelSource, find_model, local_path
from prunebench.sweep.cell import RecipeCell
from prunebench.sweep.recipe import Recipe


def needs_gpu(recipe: Recipe, cells: Sequence[RecipeCell], *, device: str) -> bool:
    """Return whether any of the cells needs a GPU."""
    if device != "auto":
        return device.startswith("cuda")
    # device auto: the recipe decides, by a cell's own device or by a model with a GPU size in
    # [needs]
    named = (cell.values["device"].startswith("cuda") for cell in cells)
    return any(named) or any(cell.values["model"] in recipe.gpu_memory_gb for cell in cells)


def require_resources(
    recipe: Recipe, cells: Sequence[RecipeCell], *, device: str, here: bool = True
) -> None:
    """Check before the first cell what any of them needs: a GPU, the hub, a login.

    With `here` False the cells run elsewhere, where there may be a GPU.

    Raises:
        MissingResource: What is missing, and for which models.
    """
    models = {cell.values["model"]: find_model(cell.values["model"]) for cell in cells}
    # a model with a GPU size in the recipe is taken to need a GPU unless --device says otherwise
    big = {name: recipe.gpu_memory_gb[name] for name in models if name in recipe.gpu_memory_gb}
    if here and big and device == "auto" and not _has_gpu():
        name, size = max(big.items(), key=lambda item: item[1])
        raise MissingResource(
            f"{recipe.path} needs a CUDA device, and there is none here",
            where=f"{name} needs about {size:g} GB of its memory (computed, not measured)",
            fix="run it on a machine with such a GPU, or add --device cpu and much patience",
        )
    missing = [name for name, source in models.items() if _must_download(source)]
    if missing and not hub_reachable():
        raise MissingResource(
            f"{recipe.path} needs {', '.join(missing)}, and the hub cannot be reached",
            where=hub_problem(),
            fix="connect to the network, or fetch them first: prunebench models fetch "
            f"{missing[0]}",
        )
    # only of models that must be downloaded: files in the cache need no login
    gated = [name for name in missing if (entry := models[name].entry) and entry.gated]
    if gated and not _logged_in():
        raise MissingResource(
            f"{', '.join(gated)} {'are' if len(gated) > 1 else 'is'} gated, and nobody is logged "
            "in to the hub",
            fix="accept the license on the hub, then run hf auth login",
        )


def _must_download(source: ModelSource) -> bool:
    return source.kind == "hub" and local_path(source) is None


def _has_gpu() -> bool:

    return torch.cuda.is_available()


def _logged_in() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None
