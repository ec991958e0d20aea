"""Find the folder of a checkpoint by its path, or by the id of the run that saved it."""

from __future__ import annotations

import shlex
from pathlib import Path

from prunebench.checkpoints.save import RESULT_NAME
from prunebench.errors import IncompatibleData, MissingResource
from prunebench.models.safetensors_files import hash_stored
from prunebench.models.source import LocalModel, ModelSource
from prunebench.models.stored_model import StoredModel
from prunebench.results.schema import Result
from prunebench.results.store import Damaged, ResultStore, read_copy, read_result


def find_checkpoint(name: str, store: ResultStore) -> tuple[Path, Result | None]:
    """Return the folder of a checkpoint or of a run's saved model, and its result.

    Args:
        name: A folder, or the id of a run.
        store: Where to look up the id.

    Raises:
        MissingResource: There is no such folder, or the run's weights were not saved here.
        IncompatibleData: The run's result is damaged, or another run has saved to its folder since.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        copy = read_copy(path / RESULT_NAME) if (path / RESULT_NAME).is_file() else None
        return path, copy if isinstance(copy, Result) else None
    if "/" in name and not path.is_file():
        raise MissingResource(
            f"there is no folder {name}", fix="name one that prunebench run --save-model wrote"
        )
    result = read_result(store.find(name))
    if isinstance(result, Damaged):
        raise IncompatibleData(f"{name} is not a result", where=result.reason)
    saved = option_in(result, "--save-model")
    if saved is None or not Path(saved).is_dir():
        raise MissingResource(
            f"the weights of {result.id} are not here",
            where="only the folder that run --save-model wrote can be read",
            fix=f"make them: {result.command}" + ("" if saved else " --save-model DIR"),
        )
    _require_copy(Path(saved), result)
    return Path(saved), result


def _require_copy(folder: Path, result: Result) -> None:
    """Refuse a folder that another run has written since: its weights are not of this result."""
    path = folder / RESULT_NAME
    copy = read_copy(path) if path.is_file() else None
    if isinstance(copy, Result) and copy.id == result.id:
        return
    raise IncompatibleData(
        f"{folder} no longer has the weights of {result.id}",
        where=f"it has those of {copy.id}" if isinstance(copy, Result) else f"no readable {path}",
        fix=f"name the folder for what is in it, or make them again: {result.command}",
    )


def require_scored(folder: Path, model: StoredModel, result: Result) -> None:
    """Refuse weights that were changed after they were scored.

    Args:
        folder: The checkpoint.
        model: Its tensors, packed ones as if they were dense.
        result: Of its run.

    Raises:
        IncompatibleData: Their hash is not that of the result.
    """
    assert result.model is not None
    digest = "" if model.missing else hash_stored(model.tensors, model.parameters)
    if digest == result.model.evaluated_sha256:
        return
    what = f"they hash to {digest[:16]}..." if digest else f"{model.missing[0]} is missing"
    raise IncompatibleData(
        f"the weights in {folder} are not those that were scored",
        where=f"{what}, the result {result.id} scored {result.model.evaluated_sha256[:16]}...",
        fix="use the folder as run --save-model wrote it, or run it again",
    )


def option_in(result: Result, *names: str) -> str | None:
    """Return the value of an option in the result's command line, if it was given."""
    words = [part for word in shlex.split(result.command) for part in word.split("=", 1)]
    pairs = zip(words, words[1:], strict=False)
    return next((value for name, value in pairs if name in names), None)


def local_checkpoint(folder: Path) -> LocalModel:
    """Return the folder of a checkpoint as a model, without hashing its files.

    Its revision tells one state of config and weights from another, by their sizes and times.
    """
    source = ModelSource(folder.resolve().name, "folder", str(folder))
    files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors"))
    states = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return LocalModel(source, folder, str([str(folder.resolve()), *states]))
