"""Where results are kept: one file a run, written once, read by anybody.

    results/<model>/<method>-<sparsity>/<run_id>.json

A name is taken by `os.link`, so any number of writers on any file system that people share can
add results, and a folder of results is a plain union under git.
"""

from __future__ import annotations

import contextlib
import datetime
import difflib
import gc
import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from prunebench.errors import MissingResource, UsageError
from prunebench.files import publish_text, require_writable
from prunebench.results.schema import SCHEMA_VERSION, Result
from prunebench.spec import RunSpec


def new_run_id(spec: RunSpec) -> str:
    """Return a fresh name: the spec's hash, the time in UTC, and eight random hex digits."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    # random digits: two machines may start the same spec in the same second
    return f"{spec.spec_id[:8]}-{now}-{secrets.token_hex(4)}"


@dataclass(frozen=True)
class Damaged:
    """A file in a results folder that is not a result."""

    path: Path
    reason: str


class ResultStore:
    """A folder of results."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path_of(self, result: Result) -> Path:
        """Return where a result belongs."""
        return self.root / result.spec.model_slug / result.spec.cell / f"{result.id}.json"

    def require_writable(self, spec: RunSpec) -> None:
        """Find out before the work whether its result could be saved.

        Raises:
            SaveError: The folder cannot be written to.
        """
        require_writable(self.root / spec.model_slug / spec.cell)

    def publish(self, result: Result) -> Path:
        """Add a result; returns its path.

        Raises:
            SaveError: It could not be written, or the name is taken.
        """
        path = self.path_of(result)
        publish_text(path, result.to_json())
        return path

    def read(
        self, paths: list[Path] | None = None, *, layers: bool = True
    ) -> tuple[list[Result], list[Damaged]]:
        """Read all results (or those at `paths`), sorted by path, and name what is damaged.

        Args:
            paths: Which files; None for all in the folder.
            layers: False to skip the layers. They are nearly all of a result: a table of 2,000 of
                them needs no 420,000 layers. Whether they are sound is then not checked.

        Raises:
            MissingResource: There is no such folder.
        """
        if paths is None:
            if not self.root.is_dir():
                raise MissingResource(
                    f"there is no results folder {self.root}",
                    fix="run prunebench run --method wanda, or name one with --results-dir",
                )
            paths = [p for p in self.root.rglob("*.json") if not p.name.startswith(".")]
        results: list[Result] = []
        damaged: list[Damaged] = []
        with _no_garbage_collection():
            for path in sorted(paths):
                outcome = read_result(path, layers=layers)
                if isinstance(outcome, Damaged):
                    damaged.append(outcome)
                else:
                    results.append(outcome)
        return results, damaged

    def newest(self, spec: RunSpec, *, layers: bool = False) -> Result | None:
        """Return the newest finished result of a spec that has been resolved; no stale one."""
        of_spec = self.of(spec, layers=layers)
        same = [result for result in of_spec if result.status == "ok" and not result.stale]
        return max(same, key=lambda result: result.created_at, default=None)

    def of(self, spec: RunSpec, *, layers: bool = False) -> list[Result]:
        """Return all results of a spec that has been resolved, failed ones too."""
        folder = self.root / spec.model_slug / spec.cell
        # 8 digits narrow the search; the whole hash decides below
        paths = sorted(folder.glob(f"{spec.spec_id[:8]}-*.json"))
        results, _ = self.read(paths, layers=layers) if paths else ([], [])
        return [result for result in results if result.spec_id == spec.spec_id]

    def find(self, name: str) -> Path:
        """Return the file of a result named by its id, the beginning of one, or its path.

        Raises:
            UsageError: No result is called so, or several are.
            MissingResource: There is no results folder.
        """
        if Path(name).is_file():
            return Path(name)
        if not self.root.is_dir():
            raise MissingResource(
                f"there is no results folder {self.root}",
                fix="name one with --results-dir, or the path of a result",
            )
        paths = {path.stem: path for path in sorted(self.root.rglob("*.json"))}
        names = [path for path in paths if path.startswith(name)]
        # a complete id wins over longer ones that begin with it
        if len(names) == 1 or name in names:
            return paths[name if name in names else names[0]]
        if names:
            raise UsageError(
                f"{name!r} is the beginning of {len(names)} results",
                where=", ".join(names[:4]) + (", ..." if len(names) > 4 else ""),
                fix="give more of the id",
            )
        near = difflib.get_close_matches(name, paths, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(
            f"no result is called {name!r}",
            where=f"there are {len(paths)} in {self.root}",
            fix=f"{hint}prunebench compare --json lists the result_ids",
        )


def holds_results(root: Path) -> bool:
    """Whether a folder is there and holds a result, finished, failed or damaged."""
    return any(not path.name.startswith(".") for path in root.rglob("*.json"))


def _without_layers(text: str) -> str:
    """Cut the layers out of a document, if they are where we write them."""
    # the list ends at the first `]`; one inside a string has a quote behind it on its line, and
    # then the whole document is read
    begin = text.find('"layers": [')
    end = text.find("]", begin)
    if begin < 0 or end < 0 or '"' in text[end + 1 : text.find("\n", end)]:
        return text
    return f'{text[:begin]}"layers": [{text[end:]}'


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Pause the search for cycles: it walks all layers read so far again and again, for nothing.

    2,000 results are 420,000 layers; the search takes two thirds of the time to read them.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.unfreeze()  # all that was read is now in the oldest generation, without a walk
        if was_on:
            gc.enable()


def read_result(path: Path, *, layers: bool = True) -> Result | Damaged:
    """Read one file; anything that is wrong with it comes back as `Damaged`."""
    result = read_copy(path, layers=layers)
    if isinstance(result, Result) and result.id != path.stem:
        return Damaged(path, f"its id {result.id!r} is not its file name")
    return result


def read_copy(path: Path, *, layers: bool = True) -> Result | Damaged:
    """Read a result that lies under another name, as in the folder of a checkpoint."""
    try:
        text = path.read_text(encoding="utf-8")
        if not layers:
            text = _without_layers(text)
        result = Result.model_validate_json(text)
    except OSError as error:
        return Damaged(path, f"cannot be read: {error.strerror}")
    # before ValueError, of which pydantic's error is a subclass
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        return Damaged(path, _why_not_read(text) or reason)
    # bytes that are no UTF-8 end here
    except ValueError as error:
        return Damaged(path, f"not a JSON object: {error}")
    # a document without one would pass: the field has a default
    if "schema_version" not in result.model_fields_set:
        return Damaged(path, _wrong_version(None))
    # a spec that was edited by hand would be filed under the wrong settings
    if result.spec_id != result.spec.spec_id:
        return Damaged(path, "its spec_id does not follow from its spec")
    return result


def _why_not_read(text: str) -> str:
    """Return what is wrong with the document as a whole; empty if one of its fields is wrong."""
    try:
        document = json.loads(text)
    except ValueError as error:
        return f"not a JSON object: {error}"
    if not isinstance(document, dict):
        return f"not a JSON object but a {type(document).__name__}"
    version = document.get("schema_version")
    return _wrong_version(version) if version != SCHEMA_VERSION else ""


def _wrong_version(version: object) -> str:
    newer = isinstance(version, int) and version > SCHEMA_VERSION
    hint = ": written by a newer prunebench, update this one" if newer else ""
    return f"schema version {version!r}, this program reads {SCHEMA_VERSION}{hint}"
