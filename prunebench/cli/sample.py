"""`prunebench sample`: what the dense and the pruned models write after the same prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunebench.cli.completions import print_completions
from prunebench.cli.progress import choose_progress
from prunebench.errors import (
    IncompatibleData,
    MissingResource,
    PrunebenchError,
    UsageError,
    nearest,
)
from prunebench.results.completions import PROMPTS
from prunebench.results.store import ResultStore
from prunebench.spec import AUTO, DTYPES

if TYPE_CHECKING:
    from prunebench.run.sample import Sampled

_DEFAULT_PROMPTS = 3


def sample_command(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN|DIR...",
            help="Folders of pruned models (plain, packed24 or sparse-24-bitmask), or ids of "
            "results whose weights were saved.",
        ),
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt", "-p", metavar="TEXT",
            help="A text to continue; may be repeated. (default: three short texts)",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", help="A text file with one prompt a line."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a completion, at most.")
    ] = 64,
    temperature: Annotated[
        float,
        typer.Option(min=0.0, help="Above 0 tokens are sampled; 0 takes the most likely one."),
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling, anew for each prompt.")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put each prompt into the model's chat template.")
    ] = False,
    dense: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The dense model: alias, org/name, folder or .gguf file. (default: the one that "
            "the results name)",
        ),
    ] = None,
    no_dense: Annotated[
        bool, typer.Option("--no-dense", help="Leave the dense model out.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="float32, bfloat16, float16, or auto: that of the result, else the checkpoint's.",
        ),
    ] = AUTO,
    results_dir: Annotated[
        Path, typer.Option(envvar="PRUNEBENCH_RESULTS_DIR", help="Folder of the shared table.")
    ] = Path("results"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:  # fmt: skip
    """Continue prompts with the dense model and with pruned ones, side by side.

    The models are loaded one after the other. Where a text leaves the dense model's, it is marked.
    Every model has its own tokenizer; the settings in generation_config.json are not used. Tokens
    per second are those of these completions on this machine; bench is the measurement.
    """
    texts = _read_prompts(prompt or [], prompts)
    if dtype not in (AUTO, *DTYPES):
        raise UsageError(f"--dtype {dtype!r} is not known", fix=nearest(dtype, (AUTO, *DTYPES)))
    if dense is not None and no_dense:
        raise UsageError("--dense does not go with --no-dense", fix="leave one of them out")
    progress = choose_progress(quiet=quiet)
    with progress.stage("start", detail="loading torch and transformers"):
        from prunebench.evaluate.generation import Decoding
        from prunebench.models.device import choose_device
        from prunebench.run.sample import SampleSetup, prepare_sample, sample
    setup = SampleSetup(
        store=ResultStore(results_dir), device=choose_device(device), dtype=dtype,
        dense=not no_dense, dense_name=dense, chat=chat,
        decoding=Decoding(max_new_tokens, temperature, seed), progress=progress,
    )  # fmt: skip
    models = prepare_sample(checkpoints, texts, setup)
    sampled: list[Sampled] = []
    failure: BaseException | None = None
    try:
        sample(models, setup, sampled=sampled)
    except (KeyboardInterrupt, PrunebenchError) as error:
        failure = error  # what was written until then is printed first
    if any(model.completions for model in sampled):
        document = _document(texts, sampled, setup, interrupted=failure is not None)
        if as_json:
            typer.echo(json.dumps(document, indent=1, ensure_ascii=False))
        else:
            print_completions(document)
    if failure is not None:
        raise failure


def _read_prompts(given: list[str], path: Path | None) -> list[str]:
    """Return the prompts of --prompt and of --prompts, in this order; three of ours without any."""
    if any(not text.strip() for text in given):
        raise UsageError("--prompt is empty", fix='give a text, as in --prompt "Once upon a time"')
    lines: list[str] = []
    if path is not None:
        try:
            lines = path.read_text("utf-8").splitlines()
        except UnicodeDecodeError:
            raise IncompatibleData(f"{path} is not UTF-8 text") from None
        except OSError as error:
            raise MissingResource(f"cannot read {path}", where=str(error.strerror)) from None
        lines = [line for line in lines if line.strip()]
        if not lines:
            raise UsageError(f"{path} holds no prompt", fix="write one prompt a line")
    return [*given, *lines] or list(PROMPTS[:_DEFAULT_PROMPTS])


def _document(
    texts: list[str], sampled: list[Sampled], setup: Any, *, interrupted: bool
) -> dict[str, Any]:
    """Return all that was written, as JSON prints it."""
    from prunebench.run.result import describe_hardware

    decoding = setup.decoding
    return {
        "max_new_tokens": decoding.max_new_tokens,
        "temperature": decoding.temperature,
        "seed": decoding.seed if decoding.temperature else None,
        "chat": setup.chat,
        "complete": not interrupted,
        "hardware": describe_hardware(setup.device).model_dump(),
        "models": [_model_document(model) for model in sampled],
        "prompts": [
            {"prompt": text, "completions": _completions(number, sampled)}
            for number, text in enumerate(texts)
        ],
    }


def _model_document(sampled: Sampled) -> dict[str, Any]:
    model, rate = sampled.model, sampled.tokens_per_second
    return {
        "name": model.name,
        "dense": model.dense,
        "folder": str(model.local.source.location or model.local.path),
        "result": model.result.id if model.result else None,
        "dtype": model.dtype,
        "stored": model.stored,
        "backend": sampled.backend or "dense",
        "tokens_per_second": rate and round(rate, 2),
    }


def _completions(number: int, sampled: list[Sampled]) -> list[dict[str, Any]]:
    """Return what each model wrote after the prompt of a number."""
    from prunebench.evaluate.generation import same_tokens

    rows = []
    written = {each.model.name: each for each in sampled if len(each.completions) > number}
    for name, each in written.items():
        completion, base = each.completions[number], written.get(each.model.dense or "")
        same = None
        # tokens of two tokenizers cannot be compared; the texts are
        if base is not None and not each.model.is_dense:
            other = base.completions[number]
            if other.prompt_ids == completion.prompt_ids:
                same = same_tokens(completion.token_ids, other.token_ids)
        rows.append(
            {
                "model": name, "text": completion.text, "finish_reason": completion.finish,
                "prompt_tokens": len(completion.prompt_ids), "token_ids": completion.token_ids,
                "same_tokens": same,
            }
        )  # fmt: skip
    return rows
