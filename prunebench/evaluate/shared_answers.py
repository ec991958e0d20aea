"""Log-likelihoods of answers, with every beginning that they share computed once.

lm-eval runs each choice of a question by itself, with the question again before each. Here choices
are merged into trees (`evaluate.token_tree`), and logits are made for the tokens of answers only.
The same numbers up to rounding, so float32 and float64 only; in 16 bits rounding is large enough to
decide a question, and such models are asked as lm-eval asks.

Whether a model computes the same from a tree is not known from its name: one with ALiBi, a state
(Mamba) or a window shorter than the sequence would not. So the longest sequence of each task is run
by itself too, and any difference above rounding leaves the whole task to lm-eval's own loop.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from prunebench.evaluate.token_tree import TokenTree, build_tree, shared_batches
from prunebench.models.out_of_memory import AutoBatch

Request = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context and of an answer."""
Answer = tuple[float, bool]
"""Log-likelihood of an answer in nats, and whether greedy decoding would give it."""

_TOKENS = {"cpu": 256, "cuda": 2048}  # nodes of a tree; attention costs their square
_LONGEST = 2048  # tokens of a sequence: the mask has their square
_ROUNDING = 1e-3  # largest difference of log-probabilities; real ones are about 1e-5


class SharedAnswers:
    """Answers requests by trees, if the model can.

    Args:
        model: A causal language model in memory.
        rows: Sequences at a time; None is as many as a device runs well, 1 is no tree at all.

    Attributes:
        exact: Whether trees gave what plain rows give; None until the first request.
    """

    def __init__(self, model: nn.Module, *, rows: int | None = None) -> None:
        self._model = model
        self._rows = rows
        self._auto_batch = AutoBatch("tasks")
        self.exact: bool | None = None
        self._checked_length = 0

    @torch.no_grad()
    def answer(
        self, requests: Sequence[Request], *, longest: int, advance: Callable[[int], None]
    ) -> dict[int, Answer]:
        """Return the answers by request number; requests that trees cannot answer are left out.

        Args:
            requests: Contexts and answers.
            longest: Tokens that the model can read.
            advance: Called with the number of answered requests after each batch.
        """
        if not self._takes_trees():
            return {}
        longest = min(longest, _LONGEST)
        # an empty context or answer, and those cut by the model's context, are lm-eval's matter
        numbers = [
            number
            for number, (context, answer) in enumerate(requests)
            if context and answer and len(context) + len(answer) - 1 <= longest
        ]
        sequences = [_inputs(requests[number]) for number in numbers]
        tokens = _TOKENS.get(self._device.type, _TOKENS["cpu"])
        batches = [
            [numbers[i] for i in batch]
            for batch in shared_batches(sequences, tokens=tokens, rows=self._rows)
        ]
        # the longest sequence first: what fails or is not exact there fails before the work
        batches.sort(key=lambda batch: -max(len(_inputs(requests[i])) for i in batch))
        answers: dict[int, Answer] = {}
        # a sliding window shows beyond its width alone: longer ones than before are checked again
        length = max(map(len, sequences), default=0)
        if length > self._checked_length:
            first, *batches = batches
            checked = self._check([requests[i] for i in first])
            self.exact, self._checked_length = checked is not None, length
            answers.update(zip(first, checked or [], strict=False))
            advance(len(answers))
        for batch in batches if self.exact else []:
            asked = [requests[i] for i in batch]
            answers.update(zip(batch, self._answer_batch(asked), strict=True))
            advance(len(batch))
        return answers

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    def _takes_trees(self) -> bool:
        if self.exact is False or self._rows == 1:
            return False
        arguments = inspect.signature(self._model.forward).parameters
        needed = {"input_ids", "attention_mask", "position_ids", "use_cache"}
        dtype = next(self._model.parameters()).dtype
        return needed <= set(arguments) and dtype in (torch.float32, torch.float64)

    def _check(self, requests: Sequence[Request]) -> list[Answer] | None:
        """Answer by a tree, and its longest sequence and its last by plain rows too.

        The last stands behind all others in the row. None if the answers are not the same.
        """
        try:
            values = self._target_log_probabilities(requests)
        # a model that cannot take the mask raises whatever its code happens to raise; without the
        # memory for a tree, lm-eval's loop runs smaller batches
        except Exception:
            return None
        longest = max(range(len(requests)), key=lambda i: len(_inputs(requests[i])))
        for i in {longest, len(requests) - 1}:
            plain = self._target_log_probabilities([requests[i]], merged=False)[0][0]
            bound = _ROUNDING * max(1.0, plain.abs().max().item())
            if not (values[i][0] - plain).abs().max().item() <= bound:  # NaN is not exact
                return None
        return [(float(value.sum()), greedy) for value, greedy in values]

    def _answer_batch(self, requests: Sequence[Request]) -> Iterator[Answer]:
        def run(numbers: Tensor) -> Tensor:
            values = self._target_log_probabilities([requests[i] for i in numbers.tolist()])
            # float64 holds the float32 sum exactly
            return torch.tensor([[float(v.sum()), greedy] for v, greedy in values]).double()

        for part in self._auto_batch.run(run, torch.arange(len(requests))):
            for value, greedy in part.tolist():
                yield value, bool(greedy)

    def _target_log_probabilities(
        self, requests: Sequence[Request], *, merged: bool = True
    ) -> list[tuple[Tensor, bool]]:
        """Return log-probabilities of each answer's tokens, (tokens,), and if all are greedy.

        Args:
            requests: Contexts and answers.
            merged: Whether as a tree; else the one sequence as models are always called.
        """
        tree = build_tree([_inputs(request) for request in requests])
        # logits are needed where the next token is one of an answer
        places = [path[-len(r[1]) :] for path, r in zip(tree.paths, requests, strict=True)]
        nodes, rows = torch.unique(torch.cat(places), return_inverse=True)
        logits = self._logits(tree.token_ids, nodes, tree if merged else None)
        targets = torch.tensor([token for _, answer in requests for token in answer])
        targets, rows = targets.to(logits.device), rows.to(logits.device)
        values = logits[rows, targets] - logits.logsumexp(-1)[rows]  # [answer tokens of all]
        greedy = logits.argmax(-1)[rows] == targets
        lengths = [len(answer) for _, answer in requests]
        return [
            (value, bool(same.all()))
            for value, same in zip(
                torch.split(values, lengths), torch.split(greedy, lengths), strict=True
            )
        ]

    def _logits(self, token_ids: Tensor, nodes: Tensor, tree: TokenTree | None) -> Tensor:
        """Return the logits of some nodes of a row, float32 or wider, (nodes, vocabulary)."""
        device = self._device
        arguments: dict[str, object] = {"use_cache": False}
        if tree is not None:
            mask = tree.mask(next(self._model.parameters()).dtype).to(device)
            arguments |= {"attention_mask": mask, "position_ids": tree.positions.to(device)}
        nodes = nodes.to(device)
        if "logits_to_keep" in inspect.signature(self._model.forward).parameters:
            arguments["logits_to_keep"] = nodes
        logits: Tensor = self._model(input_ids=token_ids.to(device), **arguments).logits[0]
        return logits if "logits_to_keep" in arguments else logits[nodes]


def _inputs(request: Request) -> list[int]:
    """Return what a model reads: all but the last token, which is only asked for."""
    context, answer = request
    return [*context, *answer][:-1]
