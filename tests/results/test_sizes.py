"""Bytes of the forms of a checkpoint, by hand, and against a real checkpoint."""

import pytest

from prunebench.results.sizes import size_of, target_of
from tests.factories import counted, make_result, only_table

REST = 400_000  # 200,000 other parameters of 16 bits


def sized(method, sparsity, *, realised=0.5, bits=None, symmetric=False, removal=None, **more):
    result = counted(make_result(method=method, sparsity=sparsity, realised=realised, **more))
    fields = result.model_dump()
    fields["sparsity"]["removal"] = removal
    if bits:
        fields["quantization"] = {
            "bits": bits, "group_size": 100, "symmetric": symmetric, "groups": 10_000,
            "exact": True,
        }  # fmt: skip
    return type(result).model_validate(fields)


REMOVED = {"blocks": [3], "blocks_before": 4, "removed_weights": 250_000,
           "removed_parameters": 251_000}  # fmt: skip


@pytest.mark.parametrize(
    ("result", "form", "prunable_bytes"),
    [
        (sized("dense", "0", realised=0.0), "dense", 2_000_000),
        # two of four values of 16 bits, and 4 bits that say which
        (sized("wanda", "2:4"), "2:4", 1_000_000 + 125_000),
        (sized("wanda", "1:4", realised=0.75), "2:4", 1_125_000),
        (sized("wanda", "4:8"), "bitmap", 1_125_000),
        (sized("wanda", "0.7", realised=0.7), "bitmap", 600_000 + 125_000),
        # a bitmap would cost more than it saves
        (sized("wanda", "0.05", realised=0.05), "dense", 2_000_000),
        # codes, and for each group a step of 16 bits and a zero point of 4
        (sized("gptq", "0", realised=0.1, bits=4), "INT4", 500_000 + 25_000),
        (sized("gptq", "0", realised=0.1, bits=4, symmetric=True), "INT4", 500_000 + 20_000),
        (sized("gptq", "0", realised=0.1, bits=8), "INT8", 1_000_000 + 30_000),
        (sized("gptq", "0", realised=0.1, bits=3), "INT3", 375_000 + 23_750),
        (sized("sparsegpt", "2:4", bits=4), "2:4 + INT4", 250_000 + 125_000 + 25_000),
        (sized("sparsegpt", "0.5", bits=4), "bitmap + INT4", 250_000 + 125_000 + 25_000),
        # 750,000 weights are left, and 1,000 norms are gone with the block
        (sized("depth", "0.25", realised=0.0, removal=REMOVED), "dense", 1_500_000 - 2_000),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_bytes_of_every_form_by_hand(result, form, prunable_bytes):
    size = size_of(result)
    assert (size.form, size.total_bytes) == (form, prunable_bytes + REST)
    assert size.dense_bytes == 2_400_000
    assert size.ratio == size.total_bytes / 2_400_000


def test_int4_with_2of4_takes_as_many_bits_as_int3_but_for_the_zero_points():
    both, int3 = (size_of(sized(m, s, bits=b)) for m, s, b in
                  (("sparsegpt", "2:4", 4), ("gptq", "0", 3)))  # fmt: skip
    assert both.total_bytes - int3.total_bytes == 10_000 // 8


@pytest.mark.parametrize(("sparsity", "form"), [("2:4", "2:4"), ("0.5", "bitmap")])
def test_it_is_what_a_checkpoint_in_16_bits_would_take(tmp_path, sparsity, form):
    """The same counts, from the tensors of a file instead of the numbers of a result."""
    import torch
    from safetensors.torch import save_file

    from prunebench.checkpoints.sizes import computed_storage
    from prunebench.models.safetensors_files import stored_tensors
    from prunebench.pruners.magnitude import smallest_dropped
    from prunebench.sparsity import Sparsity

    generator = torch.Generator().manual_seed(0)
    target = Sparsity.parse(sparsity)
    weight = smallest_dropped(torch.randn(64, 96, generator=generator), target).bfloat16()
    other = torch.randn(1000, generator=generator).bfloat16()
    path = tmp_path / "model.safetensors"
    save_file({"model.layers.0.mlp.up_proj.weight": weight, "other": other}, path)
    stored = computed_storage(stored_tensors([path]))
    result = make_result(method="wanda", sparsity=sparsity)
    size = size_of(counted(result, parameters=64 * 96 + 1000, prunable=64 * 96))
    assert (size.form, size.dense_bytes) == (form, stored.dense_bytes)
    assert size.total_bytes == stored.best[1]


def test_rows_are_compared_with_rows_of_the_same_bits():
    results = [
        sized("sparsegpt", "2:4", value=80.0, method_options={"quantize_bits": None}),
        sized("sparsegpt", "2:4", value=90.0, bits=4, method_options={"quantize_bits": 4}),
        sized("wanda", "2:4", value=120.0),
        *(sized("gptq", "0", realised=0.1, bits=bits, value=value, seed=seed,
                method_options={"quantize_bits": bits})
          for bits, value in ((8, 21.0), (4, 25.0)) for seed in (0, 1)),
    ]  # fmt: skip
    assert [target_of(result) for result in results[:3]] == ["2:4", "2:4 + INT4", "2:4"]
    table = only_table(results)
    rows = [(cell.method, cell.target, cell.size.form) for cell in table.cells]
    assert rows == [
        ("dense", "0", "dense"), ("gptq", "INT8", "INT8"), ("gptq", "INT4", "INT4"),
        ("sparsegpt", "2:4", "2:4"), ("wanda", "2:4", "2:4"),
        ("sparsegpt", "2:4 + INT4", "2:4 + INT4"),
    ]  # fmt: skip
    best = [score.best for cell in table.cells for score in cell.scores.values()]
    assert best == [False, False, False, True, False, False]
    assert table.has_sizes and not only_table(results[:1]).has_sizes


def test_the_tables_show_the_bytes_where_sparsity_does_not_say_them(cli, tmp_path):
    import csv
    import io

    from prunebench.results.store import ResultStore

    store = ResultStore(tmp_path)
    results = [sized("wanda", "2:4"), sized("gptq", "0", realised=0.1, bits=4)]
    for result in results:
        store.publish(result)
    folder = ["--results-dir", tmp_path]
    text = cli("compare", *folder).stdout
    assert "INT4" in text and "0.385" in text and "0.635" in text
    assert "size: bytes beside dense in 16 bits, computed" in text
    assert "size" not in cli("compare", "method=wanda", *folder).stdout
    shown = cli("compare", "method=wanda", "--columns", "score,size,form", *folder).stdout
    assert "0.635" in shown
    rows = list(csv.DictReader(io.StringIO(cli("compare", "-f", "csv", *folder).stdout)))
    by_target = {row["target"]: row for row in rows}
    assert by_target["INT4"]["stored_as"] == "INT4"
    assert by_target["INT4"]["size_bytes"] == str(size_of(results[1]).total_bytes)
    assert float(by_target["2:4"]["size_ratio"]) == pytest.approx(0.6354, abs=1e-4)
    assert "0.385 (INT4)" in cli("compare", "-f", "md", *folder).stdout
