"""Models that a caller holds: refuse what cannot be read or pruned in place, and leave no trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from prunebench.errors import IncompatibleData
from prunebench.models.linears import Linear
from prunebench.models.source import ModelSource, catalog, find_model, local_path
from prunebench.spec import DTYPES


def source_of(model: nn.Module) -> ModelSource:
    """Return where a model was loaded from, as far as it says; its class where it does not.

    A model of a wheel is recognized by its folder, so that it gets the texts that a run of its
    alias gets.
    """
    config: Any = model.config
    name = str(getattr(config, "_name_or_path", "") or "")
    for alias, entry in catalog().items():
        if entry.wheel and str(local_path(find_model(alias))) == name:
            return find_model(alias)
    # the kind decides between the versions of a text only: those of the hub here
    return ModelSource(name or type(model).__name__, "folder", name)


def require_causal(model: Any) -> None:
    """Refuse an object that is no causal language model of transformers, whole and on one device.

    Raises:
        IncompatibleData: It is wrapped, has no head, or its weights are elsewhere; says what to
            pass instead.
    """
    from transformers import PreTrainedModel

    reason, fix = _wrapped(model)
    if not reason and not isinstance(model, PreTrainedModel):
        reason, fix = "it is no model of transformers", "load it with AutoModelForCausalLM"
    if not reason and model.config.is_encoder_decoder:
        reason, fix = "it has an encoder", "choose a decoder-only model"
    if not reason and model.get_output_embeddings() is None:
        reason, fix = "it has no language-model head", "load it with AutoModelForCausalLM"
    if not reason:
        reason, fix = _misplaced(model)
    if reason:
        raise IncompatibleData(f"this {type(model).__name__} cannot be used", where=reason, fix=fix)


def _wrapped(model: Any) -> tuple[str, str]:
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return "it is wrapped for several devices", "pass model.module"
    # OptimizedModule, what torch.compile(model) returns
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        return "it is compiled", "pass the model that torch.compile was called with"
    parts = model.modules() if isinstance(model, nn.Module) else ()
    if any(part._compiled_call_impl is not None for part in parts):
        return "model.compile() was called", "prune before compiling"
    return "", ""


def _misplaced(model: nn.Module) -> tuple[str, str]:
    devices = {parameter.device for parameter in model.parameters()}
    # accelerate leaves weights that it offloads on the meta device
    if any(device.type == "meta" for device in devices):
        return (
            "weights are on the meta device: they are not in memory",
            "load the model without device_map, or use prunebench run --weights disk",
        )
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        return f"its weights are on {names}", 'load it on one device: model.to("cuda:0")'
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        return "its weights are sharded", "load it without FSDP or tensor parallelism"
    if any(parameter.is_inference() for parameter in model.parameters()):
        return "it was loaded under torch.inference_mode()", "load it outside of it"
    return "", ""


def require_prunable(model: Any) -> None:
    """Refuse weights that cannot be pruned in place; to be called after `require_causal`.

    Raises:
        IncompatibleData: They are quantized, computed from others, or adapters are attached; says
            what to do.
    """
    # a merged adapter is part of the weights; another one adds to every pruned matrix
    if getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False):
        raise _refused(
            model, "adapters are attached: pruned weights plus an adapter are not sparse",
            "merge them first: model = model.merge_and_unload()",
        )  # fmt: skip
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None):
        raise _refused(model, "its weights are quantized", "load the model unquantized")
    for name, module in model.named_modules():
        # torch.nn.utils.prune and parametrizations compute the weight anew in each forward pass
        if isinstance(module, nn.Linear) and "weight" not in module._parameters:
            raise _refused(
                model, f"{name}.weight is computed from another parameter",
                "make it permanent first: torch.nn.utils.prune.remove, or "
                "torch.nn.utils.parametrize.remove_parametrizations",
            )  # fmt: skip


def require_linears(model: nn.Module, linears: list[Linear]) -> str:
    """Refuse matrices of several dtypes, or of one that no run has.

    Returns:
        Their dtype, one of `spec.DTYPES`.

    Raises:
        IncompatibleData: Names the dtypes.
    """
    dtypes = {str(linear.stored.dtype).removeprefix("torch.") for linear in linears}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        raise _refused(
            model,
            f"its matrices are {' and '.join(sorted(dtypes))}",
            f"load it with dtype= one of {', '.join(DTYPES)}",
        )
    return dtypes.pop()


def note_on_buffers(model: nn.Module) -> str:
    """Return a warning where `model.to(dtype)` has rounded buffers that a run has in float32."""
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and buffer.dtype in (torch.bfloat16, torch.float16):
            dtype = str(buffer.dtype).removeprefix("torch.")
            return f"{name} is {dtype}: load the model with dtype=torch.{dtype} instead of .to()"
    return ""


def _refused(model: nn.Module, where: str, fix: str) -> IncompatibleData:
    return IncompatibleData(
        f"this {type(model).__name__} cannot be pruned in place", where=where, fix=fix
    )


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Run a model as a run does: eval mode, no gradients, no autocast; restore all at the end."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = next(model.parameters()).device
    try:
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        # methods that learn need autograd, whatever the caller's context is
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter in trained:
            parameter.requires_grad_(True)
