"""lm-eval's Hugging Face adapter (`HFLM`) around a model that is in memory already.

Import it inside `quiet_libraries`: it imports lm-eval, which writes to the terminal.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn

from prunebench.calibration.vocabulary import vocabulary_size
from prunebench.evaluate.requests import require_known_ids
from prunebench.evaluate.shared_answers import SharedAnswers
from prunebench.models.out_of_memory import AutoBatch
from prunebench.models.stream import batch_logits, is_streamed

_BATCH_SIZE = {"cpu": 1, "cuda": 16}

Answered = Callable[[int, int], None]
"""Called with the number of answered requests and the number of all."""


def wrap_model(
    model: nn.Module, task_name: str, *, tokenizer: Any, batch_size: int | None, answered: Answered
) -> Any:
    """Return the adapter that lm-eval's evaluator asks.

    Args:
        model: A causal language model; its blocks may be on disk.
        task_name: For error messages.
        tokenizer: The model's.
        batch_size: Sequences at a time; None is 1 on a CPU and 16 on CUDA, where their shared
            beginnings are not computed once.
        answered: Called after each batch.
    """
    device = next(model.parameters()).device
    size = batch_size or _BATCH_SIZE.get(device.type, 1)
    options: dict[str, Any] = {"tokenizer": tokenizer, "batch_size": size, "answered": answered}
    if is_streamed(model):
        return StreamedModel(model, task_name, **options)
    return ResidentModel(model, task_name, shared=SharedAnswers(model, rows=batch_size), **options)


class _CheckedModel(HFLM):  # type: ignore[misc]
    """Refuses token ids that the model's embedding has no row for."""

    def __init__(
        self, model: Any, task_name: str, *, tokenizer: Any, batch_size: int, answered: Answered
    ) -> None:
        # HFLM takes a loaded model as it is: it does not load or move it
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size
        )
        self._task_name = task_name
        self._answered = answered
        self._embedding_rows = vocabulary_size(model)

    def _require_known(self, sequences: Iterable[Iterable[int]]) -> None:
        require_known_ids(
            sequences, self._task_name, tokenizer=self.tokenizer, vocabulary=self._embedding_rows
        )

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        # CUDA reports an id beyond the embedding as a device-side assert, which names neither the
        # id nor the task and leaves the process without a usable device
        self._require_known(ids for _, context, answer in requests for ids in (context, answer))
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def tok_batch_encode(self, *args: Any, **kwargs: Any) -> Any:
        # generate_until tokenizes here and never calls _loglikelihood_tokens
        token_ids, attention_mask = super().tok_batch_encode(*args, **kwargs)
        self._require_known(token_ids.tolist())
        return token_ids, attention_mask


class ResidentModel(_CheckedModel):
    """A model in memory: reports answered requests, halves a batch that does not fit.

    Beginnings that sequences share are computed once (`shared`), where that is exact; lm-eval's own
    loop answers the rest.
    """

    def __init__(self, *args: Any, shared: SharedAnswers, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._shared = shared
        self._auto_batch = AutoBatch("tasks")
        self._total = self._done = 0

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        self._total, self._done = len(requests), 0
        self._require_known(ids for _, context, answer in requests for ids in (context, answer))
        answers = self._shared.answer(
            [(context, answer) for _, context, answer in requests],
            longest=self.max_length,
            advance=self._advance,
        )
        rest = [number for number in range(len(requests)) if number not in answers]
        plain = super()._loglikelihood_tokens([requests[i] for i in rest], *args, **kwargs)
        answers.update(zip(rest, plain, strict=True))
        # lm-eval answers several one-token choices from one row of logits, so fewer rows than
        # requests are run and the count of `_model_call` may stop short of the total
        self._answered(self._total, self._total)
        return [answers[number] for number in range(len(requests))]

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        forward = functools.partial(super()._model_call, **kwargs)
        # more than one part once a batch has run out of memory; the rows stay in order
        parts = list(self._auto_batch.run(forward, inps))
        logits = parts[0] if len(parts) == 1 else torch.cat(parts)  # [batch, tokens, vocabulary]
        self._advance(len(inps))
        return logits

    def _advance(self, count: int) -> None:
        self._done = min(self._total, self._done + count)
        self._answered(self._done, self._total)


class StreamedModel(_CheckedModel):
    """A model whose blocks are on disk: collects all batches, then streams them block by block.

    lm-eval asks for one batch after the other, so its loop is run twice: once with logits of zero
    to collect the batches, and once with the answers.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._batches: list[Tensor] = []
        self._logits: Iterator[Tensor] | None = None

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        self._batches, self._logits = [], None
        # first pass: `_model_call` collects the batches; answers from its zeros are dropped
        super()._loglikelihood_tokens(requests, *args, **kwargs)
        total, done = sum(map(len, self._batches)), 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self._answered(done, total)

        # second pass: equal requests are sorted and batched in the same way, so that the n-th
        # call gets the logits of the n-th batch
        self._logits = batch_logits(self.model, self._batches, advance=advance)
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._logits is None:
            self._batches.append(inps.cpu())  # all batches are held at once: not on the device
            shape = (*inps.shape, self._embedding_rows)
            return torch.zeros(shape, dtype=self.model.dtype)  # [batch, tokens, vocabulary]
        return next(self._logits)
