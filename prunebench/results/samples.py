"""What a run got for every document and window, kept beside its result by `--log-samples`.

    results/<model>/<method>-<sparsity>/<run_id>.samples.jsonl

One line an item. Two runs are compared item by item (`compare --paired`) where protocol, number
and hash of an item agree, so the same questions are compared whatever each run scored besides.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from prunebench.errors import IncompatibleData, MissingResource
from prunebench.files import publish_text

SUFFIX = ".samples.jsonl"


class Sample(BaseModel):
    """One document of a task, or one window of a text.

    Attributes:
        protocol: As in the score.
        item: Number of the document or window, from 0.
        sha256: Hash of the document with its prompt and target, or of the window's tokens.
        values: What the pruned model got, by metric: `acc` is 0 or 1; `nll` of a window is the mean
            cross-entropy of its targets in nats, whose mean over windows is log(token_ppl).
        dense_values: The same of the dense model.
    """

    # a model that broke gives NaN: pydantic would write null, which is not read again
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    protocol: str
    item: int
    sha256: str
    values: dict[str, float]
    dense_values: dict[str, float]


def samples_path(result_path: Path) -> Path:
    """Return where the samples of a result lie."""
    return result_path.with_name(result_path.stem + SUFFIX)


def write_samples(result_path: Path, samples: Iterable[Sample]) -> Path:
    """File the samples of a result that has been published; returns their path.

    Raises:
        SaveError: They could not be written, or are there already.
    """
    path = samples_path(result_path)
    publish_text(path, "".join(sample.model_dump_json() + "\n" for sample in samples))
    return path


def read_samples(result_path: Path) -> list[Sample]:
    """Read the samples of a result.

    Raises:
        MissingResource: The run logged none.
        IncompatibleData: The file is damaged; the line is named.
    """
    path = samples_path(result_path)
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise MissingResource(
            f"{result_path.stem} has no samples",
            where=f"{path}: {error.strerror}",
            fix="repeat the run with --log-samples",
        ) from None
    samples = []
    for number, line in enumerate(lines, 1):
        try:
            samples.append(Sample.model_validate_json(line))
        except ValidationError as error:
            what = error.errors()[0]["msg"]
            raise IncompatibleData(f"{path} is damaged", where=f"line {number}: {what}") from None
    return samples
