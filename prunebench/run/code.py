"""The code that computes a run's numbers: what it has saved is resumed by the same code only."""

from __future__ import annotations

import hashlib
import json
import platform
import secrets
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch

from prunebench import __version__
from prunebench.files import sha256_file
from prunebench.results.versions import parts_of, versions_of
from prunebench.run.resolve import ResolvedSpec


def code_sha256(resolved: ResolvedSpec) -> str:
    """Return a hash of the code of a run, and of where it runs.

    Not the specification alone says what the numbers are: other versions of a method or a library,
    other devices or CPUs give others, and a result must not mix those of two of them.
    """
    import transformers

    parts = (
        resolved.pruner, resolved.allocator, resolved.recoverer, resolved.model_recoverer,
    )  # fmt: skip
    facts = [
        __version__, versions_of(parts_of(resolved.spec)), [_source_sha256(part) for part in parts],
        str(torch.__version__), transformers.__version__, resolved.device.type, platform.machine(),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _source_sha256(part: Any) -> str | None:
    """Return the hash of the files that a class of elsewhere comes from; our own have versions."""
    module = type(part).__module__
    if part is None or module.partition(".")[0] == "prunebench":
        return None
    try:
        hashes = [sha256_file(file) for file in _loaded_files(module)]
    except OSError:
        # of a notebook or a zip file: it cannot be compared, so nothing is resumed
        return secrets.token_hex(16)
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _loaded_files(module: str) -> list[Path]:
    """Return the file of a module, and those of its package, or of its folder, that are loaded."""
    package = module.partition(".")[0]
    file = Path(str(getattr(sys.modules.get(module), "__file__", None)))
    # a file by itself imports what lies beside it; beside installed ones lies what is not its own
    installed = {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
    folder = file.parent if package == module and file.parent not in installed else None
    files = {file}
    for name, loaded in list(sys.modules.items()):
        # from the dictionary: modules that load lazily may do so when an attribute is asked for
        other = getattr(loaded, "__dict__", {}).get("__file__")
        if other and (name.partition(".")[0] == package or Path(other).parent == folder):
            files.add(Path(other))
    return sorted(files)
