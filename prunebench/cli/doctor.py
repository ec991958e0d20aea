"""`prunebench doctor`: can this machine do the work?"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

import typer

from prunebench.cli.console import print_hanging
from prunebench.errors import CheckFailed, PrunebenchError

_PACKAGES = ("torch", "transformers", "datasets", "lm-eval", "safetensors", "huggingface_hub")


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and whether it stops anything."""

    name: str
    state: Literal["ok", "note", "problem"]
    text: str


def doctor_command(
    results_dir: Annotated[
        Path, typer.Option(envvar="PRUNEBENCH_RESULTS_DIR", help="Folder of the shared table.")
    ] = Path("results"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look at packages, devices, folders and the network, and say what is missing."""
    findings = [*_packages(), *_devices(), *_folders(results_dir), *_sources()]
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            print_hanging(f"{finding.state:<8} {finding.name:<16} ", finding.text)
    problems = sum(finding.state == "problem" for finding in findings)
    if problems:
        raise CheckFailed(f"{problems} problems have to be solved before a run can work")


def _packages() -> list[Finding]:
    findings = [Finding("python", "ok", sys.version.split()[0])]
    for name in _PACKAGES:
        try:
            findings.append(Finding(name, "ok", metadata.version(name)))
        except metadata.PackageNotFoundError:
            findings.append(Finding(name, "problem", "not installed: pip install prunebench"))
    return findings


def _devices() -> list[Finding]:
    import psutil
    import torch

    from prunebench.models.device import is_emulated

    memory = psutil.virtual_memory()
    threads = torch.get_num_threads()
    findings = [
        Finding("cpu", "ok", f"{threads} threads, {memory.available / 1e9:.1f} GB of memory free")
    ]
    emulated = is_emulated(torch.bfloat16, torch.device("cpu"))
    if emulated is not None:
        text = "emulated: --dtype bfloat16 is slow on this CPU" if emulated else "native"
        findings.append(Finding("bfloat16 on cpu", "note" if emulated else "ok", text))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            size = f"{gpu.total_memory / 1e9:.0f} GB, sm_{gpu.major}{gpu.minor}"
            findings.append(Finding(f"cuda:{index}", "ok", f"{gpu.name}, {size}"))
    else:
        findings.append(Finding("cuda", "note", "no CUDA device: quality only, no 2:4 speed"))
    return findings


def _folders(results_dir: Path) -> list[Finding]:
    from prunebench.files import cache_dir, require_writable

    findings = []
    for name, folder in (("cache", cache_dir()), ("results", results_dir)):
        # a diagnosis creates no folders: the nearest ancestor is tried instead
        there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        try:
            require_writable(folder if folder.exists() else there)
            free = shutil.disk_usage(there).free
            findings.append(Finding(name, "ok", f"{folder}, {free / 1e9:.0f} GB free"))
        except PrunebenchError as error:
            findings.append(Finding(name, "problem", f"{error.what}: {error.where}; {error.fix}"))
    return findings


def _sources() -> list[Finding]:
    from prunebench.download.hub import hub_problem
    from prunebench.models.source import find_model, local_path
    from prunebench.spec import RunSpec

    problem = hub_problem()
    text = f"{problem}; what lies in its cache can be used" if problem else "reachable"
    findings = [Finding("hugging face hub", "note" if problem else "ok", text)]
    name = str(RunSpec.model_fields["model"].default)
    path = local_path(find_model(name))
    place = str(path) if path else f"not here yet: prunebench models fetch {name}"
    return [*findings, Finding("default model", "ok" if path else "note", place)]
