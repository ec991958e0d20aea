"""prunebench: prune language models with any published method, and find out what it cost.

    import prunebench

    report = prunebench.prune(model, tokenizer, method="wanda", sparsity="2:4", calibration="c4")
    prunebench.perplexity(model, tokenizer, "wiki", seqlen=2048).value
    prunebench.load_results("results")
    prunebench.load("packed/")

Members are imported on first use: importing torch takes a second. After `import prunebench`,
transformers loads packed folders too, with `AutoModelForCausalLM.from_pretrained("packed/")`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunebench.api.models import fetch_model as fetch_model
    from prunebench.api.models import load as load
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
    "load": "api.models",
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
    "load",
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


# ---------------------------------------------------------------- packed folders in transformers

_QUANTIZERS = "transformers.quantizers.auto"  # the module with its table of quantization methods


def _register_packed24() -> None:
    import importlib

    importlib.import_module(f"{__name__}.checkpoints.hf_packed24").register()


class _WhenImported:
    """Registers the method `packed24` as soon as transformers imports its table, and no earlier.

    transformers has no entry points for quantization methods, and importing it takes seconds.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Return the spec of the table, which registers the method after it was executed."""
        if name != _QUANTIZERS:
            return None
        from importlib.util import find_spec

        sys.meta_path.remove(self)
        spec = find_spec(name)
        loader: Any = spec and spec.loader
        if loader is not None:
            execute = loader.exec_module

            def execute_and_register(module: Any) -> None:
                execute(module)
                _register_packed24()

            loader.exec_module = execute_and_register
        return spec


if _QUANTIZERS in sys.modules:
    _register_packed24()
else:
    sys.meta_path.insert(0, _WhenImported())
