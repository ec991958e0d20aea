"""A run: resolve names, load inputs, prune and score the model, save the result.

    from prunebench.run import run
    result = run(RunSpec(method="wanda", sparsity="2:4"), Setup())

Members are imported on first use: importing torch takes a second.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunebench.run.execute import run as run
    from prunebench.run.plan import prepare as prepare

_HOMES = {"run": "execute", "prepare": "plan"}  # `execute` is the module


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
