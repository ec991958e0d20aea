"""Divergence of a pruned model's next-token distributions from the dense model's.

    kl_divergence = mean over targets of KL(dense || pruned), in nats
    top1_changed  = share of targets before which the likeliest next token is another one

Perplexity asks only what became of the probability of the token that came next; these two see
every other change. The dense model's side is kept as the hidden states behind its last block
(windows x seqlen x hidden), from which its own final norm and head, which no method prunes, make
the logits again: no distribution is ever stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prunebench.evaluate.outcome import Measure, Outcome, standard_error
from prunebench.evaluate.perplexity import PerplexityTask
from prunebench.models.linears import find_blocks
from prunebench.models.replay import blocks_giving, run_model
from prunebench.models.stream import StreamedHead, batch_logits, is_streamed

_ROWS = 128  # tokens whose distributions are compared at a time

KL = "kl_divergence"
TOP1 = "top1_changed"


@dataclass(frozen=True)
class Divergence:
    """The dense model's behavior on a text, to be compared with a pruned one's.

    Attributes:
        text: The windows that both are scored on.
        dense: Hidden states after the last block of the dense model, (1, seqlen, hidden) for each
            window, on the CPU.
        returns_tuple: The values that each block returns besides its hidden state.
    """

    text: PerplexityTask
    dense: tuple[Float[Tensor, "1 seqlen hidden"], ...]
    returns_tuple: tuple[tuple[object, ...] | None, ...]

    @classmethod
    @torch.no_grad()
    def of_dense(
        cls, model: nn.Module, text: PerplexityTask, *, advance: Callable[[int], None]
    ) -> Divergence:
        """Run the dense model once over the windows of `text`."""
        _, blocks = find_blocks(model)
        device = next(model.parameters()).device
        if is_streamed(model):
            streamed = StreamedHead(model)
            # from disk: all windows go through a block before the next one is read
            states = streamed.run(torch.split(text.windows, 1), advance=advance)
            return cls(text, tuple(state.cpu() for state in states), tuple(streamed.returns))
        hidden: list[Tensor] = []
        returns: tuple[tuple[object, ...] | None, ...] = ()
        for window in torch.split(text.windows, 1):
            # the first window runs to the end of the model, which checks that no block is called
            # again there; the others stop after the last block, without the head
            run = run_model(model, blocks, window.to(device), to_end=not hidden)
            hidden.append(run.output.cpu())  # [1, seqlen, hidden]
            returns = tuple(run.returns_tuple)
            advance(1)
        return cls(text, tuple(hidden), returns)

    @torch.no_grad()
    def score(self, model: nn.Module, *, advance: Callable[[int], None]) -> Outcome:
        """Return both measures of `model` on the text."""
        _, blocks = find_blocks(model)
        device = next(model.parameters()).device
        divergences: list[float] = []
        changed: list[int] = []
        windows = torch.split(self.text.windows, 1)
        stream = batch_logits(model, windows, advance=advance)
        for window, hidden in zip(windows, self.dense, strict=True):
            ids = window.to(device)
            # a batch of one window is never split, so each next() is one window; the last
            # position predicts a token beyond the window and is left out, as in perplexity
            now = next(stream)[0, :-1]  # [seqlen - 1, vocabulary]
            # every block returns the stored state: only the final norm and the head compute
            outputs = [hidden.to(device)] * len(blocks)
            with blocks_giving(blocks, outputs, self.returns_tuple):
                # [seqlen - 1, vocabulary]
                dense = model(input_ids=ids, use_cache=False).logits[0, :-1]
            divergences.append(_summed_kl(dense, now))
            # argmax: [seqlen - 1] each
            changed.append(int((dense.argmax(-1) != now.argmax(-1)).sum()))
            del now  # or it is held while the next window runs
        next(stream, None)  # so that the last window is reported to advance
        each = self.text.windows.shape[1] - 1
        measures = {
            KL: _mean_of(divergences, each),
            TOP1: _mean_of([float(count) for count in changed], each),
        }
        return self.text.outcome(measures, KL, divergences)


def at_dense(outcome: Outcome) -> Outcome:
    """Return the same outcome for the dense model itself: no divergence."""
    zeros = {metric: Measure(0.0, None, False) for metric in outcome.measures}
    return replace(outcome, measures=zeros)


def _mean_of(sums: list[float], each: int) -> Measure:
    # all windows have as many targets, so the mean of their means is that over targets
    means = [total / each for total in sums]
    return Measure(sum(means) / len(means), standard_error(means), False)


def _summed_kl(
    dense: Float[Tensor, "tokens vocabulary"], pruned: Float[Tensor, "tokens vocabulary"]
) -> float:
    total = 0.0
    for start in range(0, len(dense), _ROWS):
        rows = slice(start, start + _ROWS)
        log_p = dense[rows].float().log_softmax(-1)  # [rows, vocabulary]
        log_q = pruned[rows].float().log_softmax(-1)  # [rows, vocabulary]
        # KL(P || Q) = sum_v P(v) (log P(v) - log Q(v)), with P dense; kl_div takes log Q first
        divergences = nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(
            -1
        )  # [rows]
        total += float(divergences.sum(dtype=torch.float64))
    return total
