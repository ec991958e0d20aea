"""`run --log-text N`: what the dense and the pruned model write after fixed prompts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from prunebench.evaluate.generation import (
    Completion,
    Decoding,
    complete,
    same_tokens,
)
from prunebench.results.completions import (
    LOGGED_TOKENS,
    PROMPTS,
    PROMPTS_VERSION,
    CompletionsBlock,
    LoggedCompletion,
)
from prunebench.run.plan import Plan


def write_completions(plan: Plan, model: nn.Module) -> list[Completion]:
    """Return the greedy completions of the run's prompts by the model as it is now."""
    prompts = plan.prompts
    if not prompts:
        return []
    total = LOGGED_TOKENS * len(prompts)
    completions = []
    with plan.progress.stage("text", total=total, detail="completions", unit="tokens") as advance:
        for ids in prompts:
            decoding = Decoding(LOGGED_TOKENS)
            completion = complete(model, plan.tokenizer, ids, decoding, advance=advance)
            if completion.finish == "interrupted":
                raise KeyboardInterrupt
            completions.append(completion)
    return completions


def build_completions_block(
    pruned: Sequence[Completion], dense: Sequence[Completion]
) -> CompletionsBlock | None:
    """Describe the completions of the pruned model, each with the dense model's."""
    if not pruned:
        return None
    return CompletionsBlock(
        prompts=PROMPTS_VERSION,
        max_new_tokens=LOGGED_TOKENS,
        completions=[
            LoggedCompletion(
                prompt=prompt,
                text=here.text,
                dense_text=beside.text,
                tokens=len(here.token_ids),
                dense_tokens=len(beside.token_ids),
                same_tokens=same_tokens(here.token_ids, beside.token_ids),
            )
            # PROMPTS has more of them: only the first N were asked for
            for prompt, here, beside in zip(PROMPTS, pruned, dense, strict=False)
        ],
    )
