"""What a folder with packed 2:4 matrices says of itself: two indexes, and keys of `config.json`.

    packed24.json                    every tensor that the folder holds, and how it is stored
    packed24.safetensors.index.json  the same, as transformers names the file of every tensor
    config.json                      `quantization_config`: the method `packed24`, its version;
                                     `transformers_weights`: the notice for who cannot read it

transformers reads the last two; `checkpoints.hf_packed24` takes it from there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prunebench.errors import IncompatibleData
from prunebench.files import write_text
from prunebench.models.safetensors_files import (
    INDEX_NAME,
    PACKED_INDEX,
    PACKED_NOTICE,
    SINGLE_NAME,
    stored_tensors,
    weight_files,
)
from prunebench.models.stored_config import (
    PACKED24,
    plain,
    quantization_settings,
    store_config,
    stored_config,
)

VALUES, CODES = ".values24", ".codes24"
VERSION = 1
SHARDS_INDEX = "packed24.safetensors.index.json"
_NOTICE_KEY = "transformers_weights"


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """Return the row of each tensor in `packed24.json`, or in the index that transformers reads.

    Raises:
        IncompatibleData: The file is damaged, or of another version.
    """
    try:
        document = json.loads(path.read_text("utf-8"))
        document = document["metadata"][PACKED24] if path.name == SHARDS_INDEX else document
        rows: dict[str, dict[str, Any]] = document["tensors"]
        sound = document["format"] == PACKED24 and document["version"] == VERSION
        sound = sound and all(row["stored"] in ("dense", PACKED24) for row in rows.values())
        sound = sound and all(len(row["shape"]) >= 0 for row in rows.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IncompatibleData(
            f"{path} is damaged", where=f"{type(error).__name__}: {error}", fix="export again"
        ) from None
    if not sound:
        raise IncompatibleData(
            f"{path} is not an index of packed24, version {VERSION}",
            where=f"it says {document['format']}, version {document['version']}",
            fix="update prunebench, or export again",
        )
    return rows


def write_rows(folder: Path, rows: dict[str, dict[str, Any]]) -> None:
    """Write `packed24.json`."""
    document = {"format": PACKED24, "version": VERSION, "tensors": rows}
    write_text(folder / PACKED_INDEX, json.dumps(document, indent=1) + "\n")


def write_settings(folder: Path) -> None:
    """Let transformers find the weights of a packed folder: its second index, and its config.

    `config.json` is replaced, not changed in place: it may be a link to that of another folder.

    Args:
        folder: Holds the weights, `packed24.json`, and the config of the dense model or its own.
    """
    rows = read_rows(folder / PACKED_INDEX)
    stored = stored_tensors(weight_files(folder))
    index = {
        "metadata": {
            "total_size": sum(tensor.stop - tensor.start for tensor in stored.values()),
            PACKED24: {"format": PACKED24, "version": VERSION, "tensors": rows},
        },
        "weight_map": {name: tensor.path.name for name, tensor in stored.items()},
    }
    write_text(folder / SHARDS_INDEX, json.dumps(index, indent=1) + "\n")
    dtypes = dict.fromkeys(row["dtype"] for row in rows.values() if row["stored"] == PACKED24)
    config = plain_config(stored_config(folder))
    config["quantization_config"] = {
        "quant_method": PACKED24, "version": VERSION, "dtype": next(iter(dtypes), None),
    }  # fmt: skip
    config[_NOTICE_KEY] = PACKED_NOTICE
    store_config(folder, config)


def has_settings(folder: Path) -> bool:
    """Return whether the config of a packed folder names the format; at first none did."""
    return quantization_settings(folder).get("quant_method") == PACKED24


def plain_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a packed folder as that of its dense model."""
    return {key: value for key, value in plain(config).items() if key != _NOTICE_KEY}


def adopt(folder: Path, transposed: set[str]) -> None:
    """Make a packed folder of one that `save_pretrained` wrote for a packed model.

    Args:
        folder: Holds `model.safetensors` or its shards, and config.json.
        transposed: Names of the matrices that the dense model stores as [in, out].
    """
    written = _saved_files(folder)
    for old in folder.glob("packed24*.safetensors"):  # of a model that was saved here before
        old.unlink()
    for path in written:
        path.rename(path.with_name("packed24" + path.name.removeprefix("model")))
    (folder / INDEX_NAME).unlink(missing_ok=True)
    rows: dict[str, dict[str, Any]] = {}
    stored = stored_tensors(sorted(folder.glob("packed24*.safetensors")))
    for name, tensor in stored.items():
        if name.endswith(VALUES):
            matrix, (out, pairs) = name.removesuffix(VALUES), tensor.shape
            across = matrix in transposed
            shape = [2 * pairs, out] if across else [out, 2 * pairs]
            rows[matrix] = {"shape": shape, "dtype": tensor.dtype} | {
                "stored": PACKED24, "transposed": across,
            }  # fmt: skip
        elif not name.endswith(CODES):
            rows[name] = {"shape": list(tensor.shape), "dtype": tensor.dtype, "stored": "dense"}
    write_rows(folder, rows)
    write_settings(folder)


def _saved_files(folder: Path) -> list[Path]:
    """Return the files of `model.safetensors.index.json`, or `model.safetensors`."""
    index = folder / INDEX_NAME
    if index.is_file():
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        return [folder / name for name in sorted(names)]
    return [folder / SINGLE_NAME]
