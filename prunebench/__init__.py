"""prunebench: prune language models with any published method, and find out what it cost.

    import prunebench

    report = prunebench.prune(model, tokenizer, method="wanda", sparsity="2:4", calibration="c4")
    prunebench.perplexity(model, tokenizer, "wiki", seqlen=2048).value
    prunebench.load_results("results")

Members are imported on first use: importing torch takes a second.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunebench.api.models import fetch_model as fetch_model
    from prunebench.api.pruning import PruningReport as PruningReport
    from prunebench.api.pruning import prune as prune
    from prunebench.api.scoring import Perplexity as Perplexity
    from prunebench.api.scoring import perplexity as perplexity
    from prunebench.errors import PrunebenchError as PrunebenchError
    from prunebench.results.frame import load_results as load_results

__version__ = "0.1.0"

_HOMES = {
    "Perplexity": "api.scoring",
    "PrunebenchError": "errors",
    "PruningReport": "api.pruning",
    "fetch_model": "api.models",
    "load_results": "results.frame",
    "perplexity": "api.scoring",
    "prune": "api.pruning",
}
"""The module of every member."""

__all__ = [
    "Perplexity",
    "PrunebenchError",
    "PruningReport",
    "__version__",
    "fetch_model",
    "load_results",
    "perplexity",
    "prune",
]


if not TYPE_CHECKING:  # a type checker would take any name for a member

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import importlib

        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__]
