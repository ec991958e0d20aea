"""`prunebench.perplexity`: score a model that the caller holds, as `run --ppl` does."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from prunebench.api.given import cut_tokens, text_name
from prunebench.api.models import usable_model
from prunebench.calibration.texts import check_text_name, placed
from prunebench.calibration.vocabulary import require_known, vocabulary_size
from prunebench.errors import UsageError
from prunebench.evaluate.perplexity import METRIC, prepare_perplexity
from prunebench.models.in_memory import source_of
from prunebench.models.load import require_context
from prunebench.progress import Progress, Silent, quiet_libraries
from prunebench.run.failures import memory_errors
from prunebench.spec import Bos


@dataclass(frozen=True, repr=False)
class Perplexity:
    """A perplexity under its protocol; only values of one protocol can be compared.

    Attributes:
        value: exp of the mean loss.
        stderr: Standard error over the windows; None for a single window.
        protocol: What was scored and how, e.g. `wiki-sample/held-out/512/v1`.
        origin: Where the text came from.
        targets: Number of predicted tokens.
        tokens_sha256: Hash of the windows.
        window_losses: Mean loss of every window, in nats a token.
    """

    value: float
    stderr: float | None
    protocol: str
    origin: str
    targets: int
    tokens_sha256: str
    window_losses: tuple[float, ...]

    def __repr__(self) -> str:
        error = "" if self.stderr is None else f" ± {self.stderr:.2g}"
        return f"Perplexity({self.value:,.4g}{error} on {self.protocol}, {self.targets:,} targets)"


def perplexity(
    model: nn.Module,
    tokenizer: Any = None,
    text: Any = "wiki",
    *,
    seqlen: int = 512,
    tokens: int | None = None,
    bos: Bos = "text",
    progress: Progress | None = None,
) -> Perplexity:
    """Return the perplexity of a model on a text, as `prunebench run --ppl` measures it.

    Args:
        model: A causal language model of transformers, on one device; dense, pruned or quantized.
        tokenizer: Of the model; may be None for token ids.
        text: A name of `prunebench list texts`, `file:PATH`, `tokens:PATH`, a text, a list of
            texts, or token ids: integers [windows, seqlen], or [tokens], which are cut into
            windows. A string without white space is a name.
        seqlen: Tokens in a window (`--ppl-seqlen`); token ids [windows, seqlen] bring their own.
        tokens: Score only the first so many tokens (`--ppl-tokens`).
        bos: `window` where every window begins with BOS, as Gemma needs (`--ppl-bos`).
        progress: Called with the stage; by default nothing is shown.

    Raises:
        UsageError: The text is unknown, or a window is longer than the model's context.
        MissingResource: The text cannot be had here.
        IncompatibleData: The model cannot be scored, the text is too short or has tokens that the
            model does not know, or the loss is not finite.

    Example:
        >>> import prunebench
        >>> from prunebench.testing import tiny_model, tiny_tokens
        >>> dense = prunebench.perplexity(tiny_model("llama"), text=tiny_tokens(samples=4))
        >>> dense.targets, dense.protocol.endswith("/24/v1"), 100 < dense.value < 1000
        (92, True, True)
    """
    progress = progress or Silent()
    with (
        tempfile.TemporaryDirectory(prefix="prunebench-") as folder,
        quiet_libraries(),
        usable_model(model),
        memory_errors(next(model.parameters()).device),
    ):
        name = text_name(cut_tokens(text, seqlen), Path(folder))
        check_text_name(name, use="evaluation")
        if tokenizer is None and not name.startswith("tokens:"):
            raise UsageError(
                "a text is scored, and there is no tokenizer",
                fix="give the tokenizer of the model, or token ids",
            )
        task = prepare_perplexity(
            placed(name, model=source_of(model).kind),
            tokenizer,
            seqlen=seqlen,
            limit_tokens=tokens,
            vocabulary=vocabulary_size(model),
            progress=progress,
            bos=bos,
        )
        require_context(model.config, task.windows.shape[1], option="ppl-seqlen")
        require_known(
            task.windows, vocabulary=vocabulary_size(model), source=task.dataset,
            tokenizer=tokenizer,
        )  # fmt: skip
        with progress.stage("score", total=task.units, detail=name, unit=task.unit) as advance:
            (outcome,) = task.score(model, advance=advance)
    measure = outcome.measures[METRIC]
    return Perplexity(
        value=measure.value,
        stderr=measure.stderr,
        protocol=outcome.protocol,
        origin=outcome.origin,
        targets=outcome.targets,
        tokens_sha256=outcome.sha256,
        window_losses=tuple(item.values["nll"] for item in outcome.items),
    )
