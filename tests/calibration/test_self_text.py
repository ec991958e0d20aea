"""Calibration text that a model writes itself."""

import torch

from benchmarks.scripts.self_text import write_windows
from prunebench.testing import tiny_model


def test_windows_are_full_follow_the_seed_and_begin_greedily():
    model = tiny_model("llama").eval()
    windows = write_windows(model, samples=3, seqlen=24, seed=0)
    assert windows.shape == (3, 24) and windows.dtype == torch.int64
    assert torch.equal(windows, write_windows(model, samples=3, seqlen=24, seed=0))
    assert not torch.equal(windows, write_windows(model, samples=3, seqlen=24, seed=1))
    # the second token is the likeliest after the first, and later ones are not always
    likeliest = model(windows).logits.argmax(-1)
    assert torch.equal(likeliest[:, :4], windows[:, 1:5])
    assert not torch.equal(likeliest[:, 4:-1], windows[:, 5:])
