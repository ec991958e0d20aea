"""Jobs, how they end, and the resources that they request from a cluster."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from prunebench.errors import PrunebenchError, UsageError, nearest

_NUMBER = (int, float)  # TOML writes 16 and 16.5 as different types
RESOURCE_KEYS: dict[str, type | tuple[type, ...]] = {
    "gpus": int, "cpus": int, "memory_gb": _NUMBER, "time": (str, int), "partition": str,
    "account": str, "qos": str, "constraint": str,
}  # fmt: skip
SLURM_ONLY = ("time", "partition", "account", "qos", "constraint")
# minutes, H:MM:SS or D-HH:MM:SS: the forms of `sbatch --time` that have one meaning
_TIME = re.compile(r"(?:(?P<d>\d+)-)?(?P<h>\d+):(?P<m>[0-5]\d):[0-5]\d|(?P<minutes>\d+)")


class Refused(PrunebenchError):
    """An engine did not take a job: wrong options, or too many jobs already."""

    exit_code = 2


@dataclass(frozen=True)
class Job:
    """One command, for any machine that runs it.

    Attributes:
        number: Chosen by the sender, to match job and end.
        words: The arguments of `prunebench`.
        folder: The folder it runs in: paths in a recipe are relative to it.
        settings: Changes to the environment; None removes a variable.
    """

    number: int
    words: tuple[str, ...]
    folder: str
    settings: Mapping[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class JobEnd:
    """How a job ended.

    Attributes:
        code: Exit code of its process, negative for a signal; None where the engine lost it.
        result_id: The result that it saved or found.
        reason: Why it failed, in one line.
        stage: The stage in which its process was ended, if known.
    """

    code: int | None
    result_id: str = ""
    reason: str = ""
    stage: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Resources:
    """Resources that one cell requests from Slurm or Ray; None is the cluster's default.

    Attributes:
        minutes: How long it may take, in Slurm.
    """

    gpus: int | None = None
    cpus: int | None = None
    memory_gb: float | None = None
    minutes: int | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Resources:
        """Build them from options of the right types.

        Raises:
            UsageError: A number is out of range, or the time is not one.
        """
        for key, least in (("gpus", 0), ("cpus", 1), ("memory_gb", 0.1)):
            if key in options and options[key] < least:
                raise UsageError(f"{key} = {options[key]} asks for too little", where="what a "
                                 "cell asks of the cluster", fix=f"at least {least}")  # fmt: skip
        values = {key: value for key, value in options.items() if key != "time"}
        if "time" in options:
            values["minutes"] = _minutes(str(options["time"]))
        return cls(**values)

    def described(self) -> str:
        """Format the requested resources."""
        asked = [(option.name, getattr(self, option.name)) for option in fields(self)]
        return ", ".join(f"{name} {value:g}" if isinstance(value, _NUMBER) else f"{name} {value}"
                         for name, value in asked if value is not None)  # fmt: skip


def read_resources(words: Sequence[str]) -> dict[str, Any]:
    """Read the words of `--resource`.

    Raises:
        UsageError: A word is not KEY=VALUE, its key unknown, or its value no number.
    """
    options: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        key = key.replace("-", "_")  # --resource memory-gb=16 as well
        if not equals or not value:
            raise UsageError(f"--resource {word!r} is not KEY=VALUE", fix="as in --resource gpus=1")
        if key not in RESOURCE_KEYS:
            raise UsageError(f"unknown key {key!r} in --resource", fix=nearest(key, RESOURCE_KEYS))
        try:
            options[key] = _typed(RESOURCE_KEYS[key], value)
        except ValueError:
            raise UsageError(f"--resource {word!r} is not a number", fix=f"as in {key}=1") from None
    return options


def _typed(kind: type | tuple[type, ...], value: str) -> Any:
    if kind is int:
        # bool("0") would be True, so kinds are named one by one; ValueError goes to the caller
        return int(value)
    return float(value) if kind == _NUMBER else value


def _minutes(text: str) -> int:
    """Read minutes, `4:00:00` or `1-12:00:00`; `4:00` is refused, for it means two things."""
    match = _TIME.fullmatch(text.strip())
    if not match:
        raise UsageError(
            f"time {text!r} is not understood",
            where="Slurm reads 4:00 as four minutes, people as four hours",
            fix="as in time=240 (minutes), 4:00:00 or 1-12:00:00",
        )
    parts = {name: int(value or 0) for name, value in match.groupdict().items()}
    # seconds are dropped: Slurm schedules by the minute
    minutes = parts["minutes"] or (parts["d"] * 24 + parts["h"]) * 60 + parts["m"]
    if minutes < 1:
        raise UsageError(f"time {text!r} is less than a minute", fix="as in time=60")
    return minutes
