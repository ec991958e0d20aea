"""Perplexity, under a protocol that is part of every number.

Protocol v1: documents joined (by a blank line, unless the source's papers join them otherwise),
tokenized in one call with special tokens as the tokenizer puts them, cut into non-overlapping
windows of `seqlen`, the tail dropped, mean cross-entropy over the `seqlen - 1` targets of every
window in float32, exp of the mean. Where `--ppl-bos window` puts BOS before every window (BOS and
`seqlen - 1` tokens of the text, tokenized without special tokens) the id says `bos-window`. The
metric is called `token_ppl`; lm-eval's `wikitext` task
is word perplexity, which is another thing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from prunebench.calibration.bos import begin_windows, require_begun, text_tokens, tokenize
from prunebench.calibration.texts import Text, TextIdentity, load_text
from prunebench.calibration.windows import hash_tokens, load_windows
from prunebench.errors import IncompatibleData
from prunebench.evaluate.outcome import Item, Measure, Outcome, standard_error
from prunebench.models.stream import batch_logits
from prunebench.progress import Progress
from prunebench.spec import BOS_WINDOW, Bos

METRIC = "token_ppl"
VERSION = "v1"
_C4_WINDOWS = 256  # SparseGPT takes the first 256 windows of its C4 subset
_LOSS_ROWS = 128  # rows of logits that are turned into losses at a time
BATCH_TOKENS = {"cpu": 512, "cuda": 8192}


@dataclass(frozen=True)
class PerplexityTask:
    """A text cut into windows, ready to be scored.

    Attributes:
        protocol: The id, e.g. `wikitext2-raw/test/2048/v1`; `bos-window/` stands before the
            version where every window begins with BOS, `/first-N` is added where only N tokens
            were used.
        windows: int64 (windows, seqlen).
    """

    protocol: str
    dataset: str
    origin: str
    limited: bool
    windows: Int[Tensor, "windows seqlen"]

    @property
    def name(self) -> str:
        """Shown by progress."""
        return self.protocol

    @property
    def unit(self) -> str:
        """The unit of `units`."""
        return "windows"

    @property
    def units(self) -> int:
        """Number of windows."""
        return len(self.windows)

    @property
    def key(self) -> str:
        """Cache key: the tokens, how they are scored, and what the outcome says of them."""
        return f"{METRIC} {VERSION} {self.tokens_sha256} {self.protocol} {self.origin}"

    @property
    def targets(self) -> int:
        """Number of predicted tokens."""
        # the first token of a window has no context to be predicted from
        return self.windows.shape[0] * (self.windows.shape[1] - 1)

    @property
    def tokens_sha256(self) -> str:
        """Hash of the windows."""
        return hash_tokens(self.windows)

    def score(self, model: nn.Module, *, advance: Callable[[int], None]) -> list[Outcome]:
        """Return the perplexity, with the mean loss of every window as its items.

        The standard error is that of the mean loss over windows, times the perplexity (the delta
        method).
        """
        losses = window_losses(model, self.windows, advance=advance)
        each = self.windows.shape[1] - 1
        # PPL = exp(-1/N sum_t log p(x_t | x_<t)), over the N targets of all windows
        value = math.exp(sum(losses) / self.targets)
        spread = standard_error([loss / each for loss in losses])
        stderr = None if spread is None else value * spread
        return [self.outcome({METRIC: Measure(value, stderr, False)}, "nll", losses)]

    def outcome(self, measures: dict[str, Measure], metric: str, sums: Sequence[float]) -> Outcome:
        """Build the outcome; items are means over each window's targets."""
        each = self.windows.shape[1] - 1
        return Outcome(
            protocol=self.protocol,
            dataset=self.dataset,
            origin=self.origin,
            targets=self.targets,
            limited=self.limited,
            sha256=self.tokens_sha256,
            measures=measures,
            items=tuple(
                Item(hash_tokens(row), {metric: total / each})
                for row, total in zip(self.windows, sums, strict=True)
            ),
        )


def prepare_perplexity(
    name: str,
    tokenizer: Any,
    *,
    seqlen: int,
    limit_tokens: int | None,
    vocabulary: int,
    progress: Progress,
    bos: Bos = "text",
) -> PerplexityTask:
    """Cut a text into windows.

    Args:
        name: A text name as `--ppl` takes it; `tokens:PATH` is used as it is, window by window.
        tokenizer: The model's tokenizer.
        seqlen: Length of a window in tokens.
        limit_tokens: Use only the first so many tokens, or None.
        vocabulary: Size of the model's vocabulary.
        progress: Reports downloads.
        bos: Where BOS is: where the tokenizer puts it, or before every window.

    Raises:
        IncompatibleData: The text has less than one window, or the windows of a token file do not
            begin with BOS as they should.
        UsageError: Every window should begin with BOS, and the tokenizer has none.
        MissingResource: It cannot be had here.
    """
    if name.startswith("tokens:"):
        path = Path(name.partition(":")[2]).expanduser()
        windows = load_windows(path, vocabulary=vocabulary)
        require_begun(windows.token_ids, tokenizer, bos, path=path)
        digest = windows.sha256
        identity = TextIdentity(f"tokens-{digest[:12]}", "all", f"sha256:{digest}")
        rows = windows.token_ids
        # a token file brings the length of its windows: --ppl-seqlen does not apply
        seqlen = rows.shape[1]
    else:
        identity = text = load_text(name, use="evaluation", progress=progress)
        rows = _cut(text, name, tokenizer, seqlen=seqlen, bos=bos)
    protocol = protocol_of(
        identity, seqlen=seqlen, bos=bos, tokens=rows.numel(), limit=limit_tokens
    )
    limited = limit_tokens is not None and limit_tokens < rows.numel()
    if limited and limit_tokens is not None:
        rows = rows[: limit_tokens // seqlen]
    return PerplexityTask(protocol, identity.dataset, identity.origin, limited, rows)


def _cut(text: Text, name: str, tokenizer: Any, *, seqlen: int, bos: Bos) -> torch.Tensor:
    """Return the windows of a text, `[windows, seqlen]`."""
    # piece: tokens of the text in a window, one less than seqlen where BOS takes a place
    ids, piece = _token_ids(text, tokenizer, seqlen=seqlen, bos=bos), text_tokens(seqlen, bos)
    # the tail that fills no window is dropped, as in the code of SparseGPT and Wanda
    count = len(ids) // piece
    if count == 0:
        raise IncompatibleData(
            f"{name} is too short: {len(ids):,} tokens, one window of {piece} is needed",
            where=f"text from {text.origin}",
            fix=f"use --ppl-seqlen {len(ids) + seqlen - piece} or less, or a longer text"
            if len(ids) > 1
            else "use a longer text",
        )
    # [windows, piece]
    rows = torch.tensor(ids[: count * piece], dtype=torch.int64).view(count, piece)
    return begin_windows(rows, tokenizer, bos)  # [windows, seqlen]


def protocol_of(
    text: TextIdentity, *, seqlen: int, bos: Bos, tokens: int | None, limit: int | None
) -> str:
    """Return the id of a protocol.

    Args:
        text: What is scored.
        seqlen: Length of a window in tokens.
        bos: Where BOS is.
        tokens: Tokens in all windows; only needed with a limit.
        limit: Score only the first so many tokens, or None.

    Raises:
        IncompatibleData: The limit is less than a window.
    """
    begins = f"{BOS_WINDOW}/" if bos == "window" else ""
    protocol = f"{text.name}/{seqlen}/{begins}{VERSION}"
    # a limit beyond the text changes no score, so the id is that of the whole text
    if limit is None or tokens is None or limit >= tokens:
        return protocol
    if limit < seqlen:
        raise IncompatibleData(
            f"--ppl-tokens {limit} is less than one window of {seqlen}",
            fix=f"use --ppl-tokens {seqlen} or more",
        )
    # rounded down to whole windows: limits that give the same windows share an id
    return f"{protocol}/first-{limit // seqlen * seqlen}"


def count_windows(name: str, tokenizer: Any, *, seqlen: int, bos: Bos, progress: Progress) -> int:
    """Return how many windows a text has.

    Raises:
        MissingResource: It cannot be had here.
    """
    text = load_text(name, use="evaluation", progress=progress)
    return len(_token_ids(text, tokenizer, seqlen=seqlen, bos=bos)) // text_tokens(seqlen, bos)


def _token_ids(text: Text, tokenizer: Any, *, seqlen: int, bos: Bos) -> list[int]:
    # one call: tokenized one by one, every document would get its own special tokens
    ids: list[int] = tokenize(tokenizer, text.joiner.join(text.documents), bos)
    if text.dataset == "c4":
        ids = ids[: _C4_WINDOWS * text_tokens(seqlen, bos)]
    return ids


@torch.no_grad()
def window_losses(
    model: nn.Module,
    windows: Int[Tensor, "windows seqlen"],
    *,
    batch_tokens: int | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> list[float]:
    """Return the summed cross-entropy of every window, in nats; one batch's logits exist at a time.

    Args:
        model: A causal language model in evaluation mode.
        windows: int64 (windows, seqlen).
        batch_tokens: Tokens of a batch; by default what suits the device.
        advance: Called with the number of windows of each batch.

    Raises:
        IncompatibleData: A loss is not finite: the model is broken.
    """
    device = next(model.parameters()).device
    tokens = batch_tokens or BATCH_TOKENS.get(device.type, 2048)
    losses: list[float] = []
    batches = torch.split(windows, max(1, tokens // windows.shape[1]))
    for logits in batch_logits(model, batches, advance=advance):
        # a batch may come back in parts (AutoBatch): a row's window is the count of losses so far
        for row in logits:
            # the logits at position t predict token t + 1: drop the last row and the first token
            losses.append(_summed_loss(row[:-1], windows[len(losses), 1:].to(device)))
        # before the next batch is computed, or the logits of two batches are held at once
        del logits, row
    mean = sum(losses) / (windows.shape[0] * (windows.shape[1] - 1))
    # `not <`, as NaN compares false; a larger mean would overflow math.exp (at 709)
    if not mean < math.log(1e300):
        raise IncompatibleData(
            f"the perplexity is not finite (mean loss {mean})",
            where="the model's logits are NaN or infinite",
            fix="use --dtype float32 or bfloat16, or a lower sparsity",
        )
    return losses


def token_ppl(
    model: nn.Module, windows: Int[Tensor, "windows seqlen"], *, batch_tokens: int | None = None
) -> float:
    """Return the perplexity of `model` on `windows`; see `window_losses`."""
    losses = window_losses(model, windows, batch_tokens=batch_tokens)
    return math.exp(sum(losses) / (windows.shape[0] * (windows.shape[1] - 1)))


def _summed_loss(logits: Tensor, targets: Tensor) -> float:
    """Sum of cross-entropies in float32; logits (tokens, vocabulary), targets (tokens,)."""
    total = 0.0
    for rows, token_ids in zip(
        torch.split(logits, _LOSS_ROWS), torch.split(targets, _LOSS_ROWS), strict=True
    ):
        # -log softmax(x)[y] = logsumexp(x) - x[y], in float32: half precision loses digits here
        rows = rows.float()
        target_logits = rows.gather(1, token_ids[:, None]).squeeze(1)  # [rows]
        total += float((rows.logsumexp(1) - target_logits).sum(dtype=torch.float64))
    return total
