"""Load models: config and tokenizer first, a skeleton without weights, then the weights."""

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
from prunebench.models.stored_config import require_unquantized


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the progress bars and warnings of transformers; problems are checked and raised."""
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

    The attention implementation that it names is replaced by the one that every run uses: it may
    need a package that is not installed, and results must not depend on what is installed.

    Args:
        path: The folder of the model.
        trust_remote_code: Whether code in the folder may be run.

    Raises:
        IncompatibleData: This version of transformers does not support the model.
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
    """Return the error for a model or tokenizer that needs another package."""
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
                type(error) is not Exception  # the tokenizers library raises plain Exceptions
            ):
                raise
            raise MissingResource(
                f"{path} has no usable tokenizer",
                where=str(error).splitlines()[0][:200],
                fix="copy tokenizer.json and tokenizer_config.json of the base model there",
            ) from error
    tokenizer.model_max_length = int(1e30)  # no warning: long texts are cut into windows
    return tokenizer


def context_length(config: Any) -> int | None:
    """Return the model's context length in tokens, or None if it has no limit (ALiBi)."""
    # Of a multimodal model, the part that reads text.
    text = config.get_text_config()
    # n_positions is GPT-2's name, max_seq_len MPT's.
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def require_context(config: Any, seqlen: int, *, option: str) -> None:
    """Raise `UsageError` if `seqlen` is longer than the model's context.

    Args:
        config: Of the model.
        seqlen: Tokens in a window.
        option: Name of the option that set it, for the error.
    """
    limit = context_length(config)
    if limit is not None and seqlen > limit:
        raise UsageError(
            f"--{option} {seqlen} is beyond the model's context of {limit} tokens",
            where="positions beyond it were never trained",
            fix=f"use --{option} {limit} or less",
        )


def skeleton(config: Any) -> nn.Module:
    """Build the model on the meta device: names and shapes, no weights, no memory.

    Raises:
        IncompatibleData: It is not a causal language model.
        MissingResource: It needs a package that is not installed.
    """
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
    """Return the attention implementation of a run: `sdpa`, or `eager` if it is not supported."""
    from transformers import AutoModelForCausalLM

    mapping: Any = AutoModelForCausalLM._model_mapping
    model_class = mapping.get(type(config), None)
    return "sdpa" if getattr(model_class, "_supports_sdpa", True) else "eager"


def load_model(path: Path, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Load a model for evaluation: eval mode, no gradients, every tensor from the files.

    Args:
        path: The folder of the model.
        dtype: Of the parameters.
        device: Where they are.

    Raises:
        IncompatibleData: A tensor is missing from the files, has no place in the model, or does not
            fit the config; or the weights are quantized.
        MissingResource: It needs a package that is not installed.
    """
    config = load_config(path)
    with quiet_transformers():
        model = load_whole(
            path, config=config, dtype=dtype, attn_implementation=attention_of(config)
        )
    model.requires_grad_(False)
    model.eval()
    ready: nn.Module = model.to(device)
    if device.type == "cpu":  # copy out of the mapped file: it would cost page faults later
        for parameter in ready.parameters():
            parameter.data = parameter.data.clone()
    return ready


def load_whole(path: Path, **options: Any) -> Any:
    """Load a folder by transformers; every tensor comes from the files, and has its place.

    Args:
        path: The folder of the model.
        **options: Of `from_pretrained`.

    Raises:
        IncompatibleData: A tensor is missing from the files, has no place in the model, or does not
            fit the config; or the weights are quantized.
        MissingResource: It needs a package that is not installed.
    """
    from transformers import AutoModelForCausalLM

    check_weight_files(path)
    require_unquantized(path)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            **options,
            use_safetensors=True,  # a pickle can run any program
            ignore_mismatched_sizes=True,  # require_loaded names them
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
    # Refuses what transformers loads without a word, such as integer codes cast to floats.
    check_tensors(model, stored)
    return model


def require_loaded(
    source: Path, model: nn.Module, info: dict[str, Any], *, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse a model if transformers initialized, ignored or could not fit a tensor.

    Args:
        source: The file or folder that was loaded.
        model: The loaded model.
        info: From `from_pretrained(..., output_loading_info=True)`.
        shapes: Shapes of the tensors in the files, as far as known.

    Raises:
        IncompatibleData: Names such a tensor.
    """
    for name, stored, expected in sorted(info["mismatched_keys"], key=lambda row: str(row[0])):
        raise IncompatibleData(
            f"{source} does not fit its config",
            where=f"{name} is {list(stored)}, the model has {list(expected)}",
            fix="check that config.json and the weights belong together",
        )
    # Shapes tell a stored causal mask from a bias of the same name, see `is_harmless`.
    extra = {str(name): shapes.get(str(name)) for name in info["unexpected_keys"]}
    _, unplaced = unplaced_tensors(model, extra)
    require_complete(source, missing=info["missing_keys"], unplaced=unplaced)
