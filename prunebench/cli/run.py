"""`prunebench run`: one spec from flags, environment, recipe and defaults, and its result."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from prunebench.cli.dry_run import print_dry_run, print_resume_info
from prunebench.cli.guard import command_line
from prunebench.cli.progress import choose_progress
from prunebench.cli.summary import print_summary
from prunebench.cli.values import collect, print_config
from prunebench.errors import UsageError
from prunebench.options import OUTSIDE_SPEC
from prunebench.processes import device_of, rank
from prunebench.results.schema import Result
from prunebench.spec import DTYPES, build_spec


def _env(name: str) -> str:
    return f"PRUNEBENCH_{name}"


_SPEC, _OUT, _HOW = "What is run", "What is kept", "How it is run"


def run_command(
    ctx: typer.Context,
    method: Annotated[
        str | None,
        typer.Option(
            "--method", "-m", envvar=_env("METHOD"), show_envvar=False, rich_help_panel=_SPEC,
            help="Pruning method: a name of `prunebench list methods`, or module:Class.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-M", envvar=_env("MODEL"), show_envvar=False, rich_help_panel=_SPEC,
            help="Alias, org/name of the hub, folder, or .gguf file. (default: smollm2-135m-q4)",
        ),
    ] = None,
    sparsity: Annotated[
        list[str] | None,
        typer.Option(
            envvar=_env("SPARSITY"), show_envvar=False, rich_help_panel=_SPEC,
            help="Ratio of zeros (0.5, 50%) or N:M, keep N of M (2:4). (default: the method's)",
        ),
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(
            envvar=_env("ALLOCATION"), show_envvar=False, rich_help_panel=_SPEC,
            help="How a ratio is spread over the layers: a name of `prunebench list allocators`, "
            "or file:PATH. (default: the method's, mostly uniform)",
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            envvar=_env("CALIBRATION"), show_envvar=False, rich_help_panel=_SPEC,
            help="Text name, file:PATH, or tokens:PATH. (default: c4)",
        ),
    ] = None,
    calibration_samples: Annotated[
        int | None,
        typer.Option(
            envvar=_env("CALIBRATION_SAMPLES"), show_envvar=False, min=1, rich_help_panel=_SPEC,
            help="Number of calibration windows. (default: 32)",
        ),
    ] = None,
    seqlen: Annotated[
        int | None,
        typer.Option(
            envvar=_env("SEQLEN"), show_envvar=False, min=2, rich_help_panel=_SPEC,
            help="Tokens in a calibration window. (default: 512)",
        ),
    ] = None,
    ppl: Annotated[
        list[str] | None,
        typer.Option(
            envvar=_env("PPL"), show_envvar=False, rich_help_panel=_SPEC,
            help="Texts for perplexity, split by commas: a name, wikitext2:PATH, file:PATH, "
            "tokens:PATH. (default: wiki)",
        ),
    ] = None,
    ppl_seqlen: Annotated[
        int | None,
        typer.Option(
            envvar=_env("PPL_SEQLEN"), show_envvar=False, min=2, rich_help_panel=_SPEC,
            help="Tokens in a perplexity window. (default: 512)",
        ),
    ] = None,
    ppl_tokens: Annotated[
        int | None,
        typer.Option(
            envvar=_env("PPL_TOKENS"), show_envvar=False, min=2, rich_help_panel=_SPEC,
            help="Score only the first so many tokens; such rows are kept apart. (default: all)",
        ),
    ] = None,
    divergence: Annotated[
        bool | None,
        typer.Option(
            "--divergence", envvar=_env("DIVERGENCE"), show_envvar=False, rich_help_panel=_SPEC,
            help="Also compare the next-token distributions on the texts with the dense model's: "
            "KL divergence and share of changed first choices.",
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            envvar=_env("TASKS"), show_envvar=False, rich_help_panel=_SPEC,
            help="Tasks or groups of lm-eval, split by commas, or the list of a paper: wanda7, "
            "maskllm7, gblm6.",
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            envvar=_env("NUM_FEWSHOT"), show_envvar=False, min=0, rich_help_panel=_SPEC,
            help="Examples before each question of a task. (default: the task's)",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            envvar=_env("LIMIT"), show_envvar=False, min=1, rich_help_panel=_SPEC,
            help="Ask only the first so many documents of each task; such rows are kept apart.",
        ),
    ] = None,
    apply_chat_template: Annotated[
        bool | None,
        typer.Option(
            "--apply-chat-template", envvar=_env("APPLY_CHAT_TEMPLATE"), show_envvar=False,
            rich_help_panel=_SPEC, help="Ask tasks in the tokenizer's chat template.",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            envvar=_env("SEED"), show_envvar=False, min=0, rich_help_panel=_SPEC,
            help="Seed of sampling and of the method. (default: 0)",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            envvar=_env("DTYPE"), show_envvar=False, rich_help_panel=_SPEC,
            help=f"{', '.join(DTYPES)}. (default: the alias's, else float32)",
        ),
    ] = None,
    within_block: Annotated[
        str | None,
        typer.Option(
            envvar=_env("WITHIN_BLOCK"), show_envvar=False, rich_help_panel=_SPEC,
            help="joint: all layers of a block see the dense block's inputs, as in the papers; "
            "sequential: each sees the inputs left by those before it. (default: joint)",
        ),
    ] = None,
    execute: Annotated[
        str | None,
        typer.Option(
            envvar=_env("EXECUTE"), show_envvar=False, rich_help_panel=_SPEC,
            help="dense, or sparse24: score the pruned 2:4 model with packed weights. "
            "(default: dense)",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", rich_help_panel=_SPEC,
            help="An option of the method, or allocation.KEY=VALUE; may be repeated.",
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            envvar=_env("RECIPE"), show_envvar=False, rich_help_panel=_SPEC,
            help="TOML file with any of the above.",
        ),
    ] = None,
    log_samples: Annotated[
        bool,
        typer.Option(
            "--log-samples", rich_help_panel=_OUT,
            help="File what came out for every document and window beside the result, for "
            "compare --paired.",
        ),
    ] = False,
    save_model: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", rich_help_panel=_OUT, help="Write the pruned model, zeros in place."
        ),
    ] = None,
    save_masks: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", rich_help_panel=_OUT, help="Write the keep masks (.npz, packed bits)."
        ),
    ] = None,
    save_calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", rich_help_panel=_OUT,
            help="Write the calibration tokens (.safetensors), for tokens:PATH.",
        ),
    ] = None,
    save_allocation: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", rich_help_panel=_OUT,
            help="Write the ratio of every layer (.json), for --allocation file:FILE.",
        ),
    ] = None,
    results_dir: Annotated[
        Path,
        typer.Option(
            envvar=_env("RESULTS_DIR"), show_envvar=False, rich_help_panel=_OUT,
            help="Folder of the shared table.",
        ),
    ] = Path("results"),
    once: Annotated[
        bool,
        typer.Option(
            "--once", envvar=_env("ONCE"), show_envvar=False, rich_help_panel=_OUT,
            help="Where a result of the same specification is filed, show that and run nothing.",
        ),
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", rich_help_panel=_OUT, help="Replace what --save-* finds there."),
    ] = False,
    device: Annotated[
        str | None,
        typer.Option(
            envvar=_env("DEVICE"), show_envvar=False, rich_help_panel=_HOW,
            help="auto, cpu, cuda or cuda:N; cuda:0,cuda:1: calibration on several GPUs. "
            "(default: auto)",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            envvar=_env("WEIGHTS"), show_envvar=False, rich_help_panel=_HOW,
            help="resident: in memory; disk: read a block at a time, and go on after a kill; "
            "auto: in memory if they fit. The result is the same. (default: auto)",
        ),
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(
            envvar=_env("ACTIVATIONS"), show_envvar=False, rich_help_panel=_HOW,
            help="Where hidden states wait between blocks that are on disk: device, cpu, disk. "
            "(default: device)",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            envvar=_env("BATCH_SIZE"), show_envvar=False, min=1, rich_help_panel=_HOW,
            help="Sequences of a task at a time. (default: 1 on a CPU, 16 on CUDA)",
        ),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            envvar=_env("BACKEND"), show_envvar=False, rich_help_panel=_HOW,
            help="What multiplies with --execute sparse24: triton, cslt, decompress, reference. "
            "(default: the best that can)",
        ),
    ] = None,
    include_path: Annotated[
        Path | None,
        typer.Option(
            envvar=_env("INCLUDE_PATH"), show_envvar=False, metavar="DIR", rich_help_panel=_HOW,
            help="Folder with more task files for lm-eval.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", rich_help_panel=_HOW, help="Check everything, load no weights."),
    ] = False,
    resume_info: Annotated[
        bool,
        typer.Option(
            "--resume-info", rich_help_panel=_HOW,
            help="Say what an interrupted run of this very command has kept, and stop.",
        ),
    ] = False,
    show_config: Annotated[
        bool,
        typer.Option(
            "--show-config", rich_help_panel=_HOW,
            help="Print every value and where it comes from, and stop.",
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", rich_help_panel=_HOW, help="Print the result as JSON.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", rich_help_panel=_HOW, help="No progress on stderr.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", rich_help_panel=_HOW, help="Show tracebacks.")
    ] = False,
) -> None:  # fmt: skip
    """Prune a model, measure what it cost, and file the result.

    Every option but --set and --save-* may also be given as PRUNEBENCH_<OPTION> in the environment.
    """
    values, sources = collect(ctx, recipe)
    spec = build_spec({key: values[key] for key in values if key not in OUTSIDE_SPEC})
    if show_config:
        print_config(values, sources, as_json=as_json)
        return
    progress = choose_progress(quiet=quiet or rank() > 0)
    with progress.stage("start", detail="loading torch and transformers"):
        from prunebench.prepare import prepare
        from prunebench.run import execute as execute_plan
        from prunebench.spec import Setup
    setup = Setup(
        results_dir=results_dir,
        device=device_of(values["device"]),
        weights=values["weights"],
        activations=values["activations"],
        batch_size=batch_size,
        include_path=include_path,
        backend=backend,
        log_samples=log_samples,
        save_model=save_model,
        save_masks=save_masks,
        save_calibration=save_calibration,
        save_allocation=save_allocation,
        replace=force,
        command=command_line(),
        progress=progress,
    )
    if resume_info:
        print_resume_info(spec, setup, as_json=as_json)
        return
    if dry_run:
        print_dry_run(spec, setup, as_json=as_json)
        return
    plan = prepare(spec, setup)
    known = _known(plan) if once else None
    if known:
        progress.note(f"{known.id} is of the same specification: nothing is run")
    result = known or execute_plan(plan)
    if result is None:  # a process that helped the first one
        return
    if as_json:
        sys.stdout.write(result.to_json())
    else:
        path = plan.store.path_of(result)
        print_summary(result, path, setup, masks=plan.pruner.needs.masks)


def _known(plan: Any) -> Result | None:
    """Return a finished result of the same specification for `--once`."""
    setup = plan.setup
    kept = (setup.save_model, setup.save_masks, setup.save_calibration, setup.save_allocation)
    if any(kept):
        raise UsageError(
            "--once does not go with --save-*",
            where="a result that is filed already has no weights to save",
            fix="leave --once out",
        )
    known: Result | None = plan.store.newest(plan.spec, layers=True)
    return known
