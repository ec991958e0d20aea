"""`prunebench export`: a checkpoint with card, masks and recipe, for the hub or a colleague."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunebench.cli.exit_codes import say
from prunebench.cli.progress import choose_progress
from prunebench.errors import IncompatibleData, MissingResource, UsageError, nearest
from prunebench.results.store import Damaged, ResultStore, read_result

if TYPE_CHECKING:
    from prunebench.checkpoints.export import To
    from prunebench.checkpoints.packed24 import Packing
    from prunebench.download.push import Repository


_NAMED = 3  # so many of the matrices that stay dense are named


def export_command(
    checkpoint: Annotated[
        str, typer.Argument(metavar="DIR", help="Folder that `run --save-model` wrote.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write.")],
    to: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="packed24 stores 2:4 matrices in 0.5625 of their bytes, which transformers loads "
            "with prunebench installed; dense as plain safetensors. (default: as they are)",
        ),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(metavar="ORG/NAME", help="Push the folder to this repository of the hub."),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Anybody may see it. (default: private)")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Push without asking.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the folder if it is there.")
    ] = False,
    results_dir: Annotated[
        Path, typer.Option(envvar="PRUNEBENCH_RESULTS_DIR", help="Folder of the shared table.")
    ] = Path("results"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")] = False,
) -> None:
    """Write a Hugging Face folder: weights, model card with scores, keep masks, recipe.

    The weights are hashed and must be those that the result scored. They are hard-linked where
    that can be. --push asks before it sends anything. With --to, any folder of a model is taken,
    also one in the format sparse-24-bitmask.
    """
    target = _format(to)
    if push is None and (public or yes):
        raise UsageError("--public and --yes go with --push", fix="add --push org/name")
    # refused here, and not at the question, which comes after the hashing and copying
    if push is not None and not yes and not _at_a_terminal():
        raise UsageError(
            f"--push {push} asks first, and there is no terminal to answer", fix="add --yes"
        )
    source = _find(checkpoint, results_dir)
    repository = _find_repository(push, public=public)
    progress = choose_progress(quiet=quiet)
    with progress.stage("start", detail="loading torch and transformers"):
        from prunebench.checkpoints.export import export
    done = export(source, output, replace=force, progress=progress, to=target, repository=push)
    # before the question: the user should see what would be sent
    if not as_json:
        _print_summary(done)
    pushed = None
    if repository and _agreed(repository, done.sizes, public=public, yes=yes):
        from prunebench.download.push import push_folder

        with progress.stage("push", detail=repository.url):
            message = "2:4, packed by prunebench"
            if done.result is not None:
                message = f"{done.result.spec.method} {done.result.spec.sparsity} by prunebench"
            push_folder(output, repository, private=not public, message=message)
        pushed = repository.url
    if as_json:
        document = {
            "folder": str(done.folder), "result": done.result and done.result.id,
            "evaluated_sha256": done.result
            and done.result.model
            and done.result.model.evaluated_sha256,
            "files": done.sizes, "linked": done.linked, "left_out": done.left_out,
            "packing": done.packing and dataclasses.asdict(done.packing), "pushed": pushed,
        }  # fmt: skip
        typer.echo(json.dumps(document, indent=1))
    elif repository:
        typer.echo(f"pushed to {pushed}" if pushed else "nothing was pushed")


def _format(name: str | None) -> To | None:
    formats: dict[str, To] = {"packed24": "packed24", "dense": "dense"}
    if name is None or name in formats:
        return formats[name] if name else None
    raise UsageError(f"--to {name!r} is not known", fix=nearest(name, formats))


def _find(name: str, results_dir: Path) -> Path:
    """Return the folder of a checkpoint; for a result, say where its weights are."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if not path.exists() and ("/" in name or not results_dir.is_dir()):
        raise MissingResource(
            f"there is no folder {name}", fix="name one that prunebench run --save-model wrote"
        )
    result = read_result(ResultStore(results_dir).find(name))
    if isinstance(result, Damaged):
        raise IncompatibleData(
            f"{name} is neither a checkpoint's folder nor a result", where=result.reason
        )
    from prunebench.checkpoints.export import no_weights

    raise no_weights(result)


def _find_repository(name: str | None, *, public: bool) -> Repository | None:
    if name is None:
        return None
    from prunebench.download.push import find_repository

    repository = find_repository(name)
    # what is pushed to a public repository is public at once, whatever --public says
    if repository.exists and not repository.private and not public:
        raise UsageError(
            f"{name} exists and is public", where=repository.url, fix="add --public to push to it"
        )
    return repository


def _agreed(repository: Repository, sizes: dict[str, int], *, public: bool, yes: bool) -> bool:
    """Print what will be sent, and ask for confirmation."""
    new = "private, new" if not public else "public, new"
    old = "private, exists already" if repository.private else "public, exists already"
    say(
        f"push {len(sizes)} files, {sum(sizes.values()) / 1e6:,.1f} MB, to {repository.url} "
        f"({old if repository.exists else new})"
    )
    say("  card and result hold the command as it was typed, with its paths")
    return yes or typer.confirm("push?", default=False, err=True)


def _at_a_terminal() -> bool:
    return sys.stdin.isatty()


def _print_summary(done: Any) -> None:
    if done.result is not None:
        spec, model = done.result.spec, done.result.model
        typer.echo(f"{spec.method} {spec.sparsity} on {spec.model}, result {done.result.id}")
        digest = model.evaluated_sha256[:16]
        typer.echo(f"  the weights are those that were scored: sha256 {digest}...")
    else:
        typer.echo("a folder without a result of prunebench: nothing says how it was made")
    if done.packing:
        _print_packing(done.packing)
    width = max(map(len, done.sizes))
    for name, size in done.sizes.items():
        note = "  hard link" if name in done.linked else ""
        typer.echo(f"  {name:<{width}}  {size:>15,} bytes{note}")
    if done.left_out:
        typer.echo(f"  left out, no part of a model: {', '.join(done.left_out)}")
    typer.echo(f"  exported to {done.folder}")
    if done.packing:
        typer.echo(f"  to load it in Python: prunebench.load({str(done.folder)!r})")


def _print_packing(packing: Packing) -> None:
    share = packing.packed_bytes / packing.dense_bytes
    typer.echo(
        f"  {len(packing.packed)} matrices are packed, {packing.packed_bytes:,} of "
        f"{packing.dense_bytes:,} bytes ({share:.4f}), embeddings and output layer included"
    )
    if packing.negative_zeros:
        typer.echo(f"  {packing.negative_zeros:,} times -0.0 became +0.0")
    for name, reason in list(packing.dense.items())[:_NAMED]:
        typer.echo(f"  stays dense: {name}, {reason}")
    if len(packing.dense) > _NAMED:
        typer.echo(f"  and {len(packing.dense) - _NAMED} more matrices stay dense")
