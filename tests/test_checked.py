"""The tests check shapes at run time: pyproject.toml names what does it."""

import pytest
import torch

from prunebench.pruners.keep import keep_rows
from prunebench.sparsity import Sparsity


def test_a_tensor_of_another_shape_is_an_error():
    with pytest.raises(Exception, match="score"):
        keep_rows(torch.ones(2, 3, 4), Sparsity.parse("0.5"))  # [out, in] is annotated
    assert keep_rows(torch.rand(2, 4), Sparsity.parse("0.5")).sum() == 4
