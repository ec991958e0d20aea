"""Specs: one hash for one meaning."""

import pytest

from prunebench.errors import UsageError
from prunebench.spec import RunSpec, build_spec, slug


def test_the_hash_follows_every_field():
    base = RunSpec(method="wanda")
    assert base.spec_id == RunSpec(method="wanda", seed=0).spec_id
    changes = {
        "method": "sparsegpt", "method_options": {"a": 1}, "model": "m", "model_revision": "r",
        "dtype": "bfloat16", "sparsity": "2:4", "allocation": "owl",
        "allocation_options": {"a": 1}, "recover": "block",
        "recover_options": {"a": 1}, "within_block": "sequential", "calibration": "wiki",
        "calibration_origin": "o", "calibration_samples": 1, "seqlen": 3, "ppl": ("c4",),
        "ppl_origins": ("o",), "ppl_seqlen": 3, "ppl_tokens": 5, "seed": 1, "divergence": True,
        "tasks": ("piqa",), "num_fewshot": 5, "limit": 10, "apply_chat_template": True,
        "execute": "sparse24", "calibration_bos": "window", "ppl_bos": "window",
        "tasks_origin": "o",
    }  # fmt: skip
    assert changes.keys() == RunSpec.model_fields.keys()
    for field, value in changes.items():
        assert base.model_copy(update={field: value}).spec_id != base.spec_id, field


def test_the_hash_does_not_depend_on_the_order_of_options():
    first = RunSpec(method="m", method_options={"a": 1, "b": 2.0})
    second = RunSpec(method="m", method_options={"b": 2.0, "a": 1})
    assert first.spec_id == second.spec_id


def test_folders_are_portable():
    spec = RunSpec(method="my_mod:Mine", model="org/name", sparsity="2:4")
    assert (spec.model_slug, spec.cell) == ("org-name", "my_mod-Mine-2of4")
    assert slug("../..//x") == "x"
    assert slug("///") == "unnamed"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"seed": -1}, "--seed -1 is not valid"),
        ({"calibration_samples": 0}, "--calibration-samples 0"),
        ({"ppl_seqlen": 1}, "--ppl-seqlen 1"),
        ({"dtype": "int8"}, "--dtype 'int8'"),
        ({"colour": "red"}, "--colour"),
    ],
)
def test_bad_values_name_their_option(values, says):
    with pytest.raises(UsageError, match=says):
        build_spec({"method": "wanda", **values})
