"""Loading: the config and tokenizer first, a skeleton without weights, then the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunebench.errors import IncompatibleData, MissingResource, UsageError
from prunebench.models.checkpoint_keys import check_tensors
from prunebench.models.complete import require_complete, unplaced_tensors
from prunebench.models.safetensors_files import check_weight_files, stored_tensors, weight_files
from prunebench.models.stored_config import require_unquantised


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and warnings; what matters is checked and raised."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_config(path: Path, *, trust_remote_code: bool = False) -> Any:
    """Read `config.json`.

    The attention that it asks for is replaced by the one that every run uses: a config may ask for
    a package that is not here, and two runs must not differ by what is installed.

    Raises:
        IncompatibleData: It is not a model that this transformers knows.
        MissingResource: It needs a package that is not installed.
    """
    from transformers import AutoConfig

    with quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        except ImportError as error:
            raise needs_package(path, error) from error
        except (ValueError, OSError, KeyError) as error:
            raise IncompatibleData(
                f"{path} has a config that transformers cannot read",
                where=str(error).splitlines()[0][:200],
                fix="update transformers, or check config.json",
            ) from error
    config._attn_implementation = attention_of(config)
    return config


def needs_package(what: Path | str, error: ImportError) -> MissingResource:
    """Return the error for something that transformers reads only with another package."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return MissingResource(
        f"{what} needs a package that is not installed",
        where=f"transformers says: {lines[0][:200]}" if lines else "",
        fix="install the package that it names, or choose another model",
    )


def load_tokenizer(path: Path) -> Any:
    """Read the tokenizer of a model folder.

    Raises:
        MissingResource: The folder has none.
    """
    from transformers import AutoTokenizer

    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
        except ImportError as error:
            raise needs_package(f"the tokenizer of {path}", error) from error
        except Exception as error:
            if not isinstance(error, ValueError | OSError | KeyError | TypeError) and (
                type(error) is not Exception  # what the library tokenizers raises
            ):
                raise
            raise MissingResource(
                f"{path} has no usable tokenizer",
                where=str(error).splitlines()[0][:200],
                fix="copy tokenizer.json and tokenizer_config.json of the base model there",
            ) from error
    tokenizer.model_max_length = int(1e30)  # long texts are cut into windows by us
    return tokenizer


def context_length(config: Any) -> int | None:
    """Return the longest sequence the model was built for, or None if it has no limit (ALiBi)."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def require_context(config: Any, seqlen: int, *, option: str) -> None:
    """Raise `UsageError` where `seqlen` is beyond the model's context."""
    limit = context_length(config)
    if limit is not None and seqlen > limit:
        raise UsageError(
            f"--{option} {seqlen} is beyond the model's context of {limit} tokens",
            where="positions beyond it were never trained",
            fix=f"use --{option} {limit} or less",
        )


def skeleton(config: Any) -> nn.Module:
    """Build the model on the meta device: shapes and names, no weights, no memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), quiet_transformers():
        try:
            model: nn.Module = AutoModelForCausalLM.from_config(config)
        except ImportError as error:
            raise needs_package(config.model_type, error) from error
        except ValueError as error:
            raise IncompatibleData(
                f"{config.model_type} is not a causal language model",
                where=str(error).splitlines()[0][:200],
                fix="choose a decoder-only model",
            ) from error
    return model


def attention_of(config: Any) -> str:
    """Return the attention that the architecture is run with: `sdpa`, or `eager` if it has none."""
    from transformers import AutoModelForCausalLM

    known: Any = AutoModelForCausalLM._model_mapping
    kind = known.get(type(config), None)
    return "sdpa" if getattr(kind, "_supports_sdpa", True) else "eager"


def load_model(path: Path, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Load the weights, ready to be evaluated: eval mode, no gradients, nothing made up.

    Raises:
        IncompatibleData: A tensor is missing from the files, has no place in the model, or does not
            fit the config; or the weights are quantised.
        MissingResource: It needs a package that is not installed.
    """
    from transformers import AutoModelForCausalLM

    check_weight_files(path)
    require_unquantised(path)
    config = load_config(path)
    with quiet_transformers():
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                attn_implementation=attention_of(config),
                ignore_mismatched_sizes=True,  # they are refused below, by name
                output_loading_info=True,
            )
        except ImportError as error:
            raise needs_package(path, error) from error
        except (ValueError, OSError, KeyError, RuntimeError) as error:
            raise IncompatibleData(
                f"{path} cannot be loaded",
                where=str(error).splitlines()[0][:200],
                fix="check that config.json and the safetensors belong together",
            ) from error
    stored = stored_tensors(weight_files(path))
    require_loaded(path, model, info, shapes={name: row.shape for name, row in stored.items()})
    check_tensors(model, stored)
    model.requires_grad_(False)
    model.eval()
    ready: nn.Module = model.to(device)
    if device.type == "cpu":  # out of the mapped file: else every later stage pays page faults
        for parameter in ready.parameters():
            parameter.data = parameter.data.clone()
    return ready


def require_loaded(
    source: Path, model: nn.Module, info: dict[str, Any], *, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse what transformers filled, left out, or could not fit, by name.

    Args:
        source: What was loaded.
        model: The model.
        info: Of `from_pretrained(..., output_loading_info=True)`.
        shapes: Of the tensors in the files, as far as known.

    Raises:
        IncompatibleData: There is any.
    """
    for name, stored, wanted in sorted(info["mismatched_keys"], key=lambda row: str(row[0])):
        raise IncompatibleData(
            f"{source} does not fit its config",
            where=f"{name} is {list(stored)}, the model has {list(wanted)}",
            fix="check that config.json and the weights belong together",
        )
    extra = {str(name): shapes.get(str(name)) for name in info["unexpected_keys"]}
    _, unplaced = unplaced_tensors(model, extra)
    require_complete(source, missing=info["missing_keys"], unplaced=unplaced)
