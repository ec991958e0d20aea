"""Several texts as one training text: names split by commas, as in `c4,wiki`.

Their documents are shuffled together, so each text has a share of the windows by its length.
"""

from __future__ import annotations

from collections.abc import Sequence

from prunebench.calibration.text_table import Text, TextIdentity, check_text_name, placed
from prunebench.calibration.texts import identify_text, load_text
from prunebench.errors import UsageError
from prunebench.progress import Progress


def names_in(names: str) -> list[str]:
    """Return the names; one that holds a path is never split."""
    return [names] if ":" in names.split(",")[0] else [name.strip() for name in names.split(",")]


def check_text_names(names: str, *, option: str) -> None:
    """Refuse names that cannot work, before anything is downloaded; `option` took them.

    Raises:
        UsageError: A name is unknown, or named twice.
        MissingResource: A file does not exist.
    """
    parts = names_in(names)
    for name in parts:
        check_text_name(name, use="calibration", option=option)
    if len(set(parts)) < len(parts):
        raise UsageError(f"a text is named twice: {names}")


def place_text_names(names: str, *, model: str) -> str:
    """Add the source to each name, see `placed`."""
    return ",".join(placed(name, model=model) for name in names_in(names))


def identify_texts(names: str) -> TextIdentity:
    """Return the identity of all texts together, without downloading any."""
    parts = [identify_text(name, use="calibration") for name in names_in(names)]
    return parts[0] if len(parts) == 1 else TextIdentity(*_joined(parts))


def load_texts(names: str, *, progress: Progress) -> Text:
    """Load all texts as one.

    Raises:
        MissingResource: One cannot be downloaded, or a file cannot be read.
        IncompatibleData: One is not text.
    """
    parts = [load_text(name, use="calibration", progress=progress) for name in names_in(names)]
    if len(parts) == 1:
        return parts[0]
    return Text(*_joined(parts), documents=[doc for part in parts for doc in part.documents])


def _joined(parts: Sequence[TextIdentity]) -> tuple[str, str, str]:
    # the name is then `c4-sample/rest,wiki-sample/rest`
    dataset = ",".join([*(part.name for part in parts[:-1]), parts[-1].dataset])
    return dataset, parts[-1].split, ",".join(part.origin for part in parts)
