"""Layers that run packed: exact by `reference`, guarded, explained, and put back."""

import copy
import json

import pytest
import torch
from torch import nn

from prunebench.errors import IncompatibleData
from prunebench.models.hashing import hash_weights
from prunebench.models.linears import find_linears
from prunebench.results.store import ResultStore
from prunebench.sparse24.backends.unpack import Decompress
from prunebench.sparse24.layer import Sparse24Linear, convert, explain
from prunebench.sparse24.layouts import FileLayout, Workspace
from prunebench.sparse24.packed import pack24, unpack24
from prunebench.testing import tiny_model, tiny_tokens
from tests.factories import policy, pruned, random_24, without_cpu_kernels


@pytest.fixture(autouse=True)
def _no_cpu_kernels(monkeypatch):
    without_cpu_kernels(monkeypatch)


# ---------------------------------------------------------------- the layer


def test_the_layer_computes_what_the_dense_one_does():
    weight, bias = random_24(24, 16), torch.randn(24).to(torch.bfloat16)
    layer = Sparse24Linear(pack24(weight), bias, policy=policy())
    for shape in ((64,), (3, 64), (2, 5, 64)):
        x = torch.randn(shape).to(torch.bfloat16)
        assert torch.equal(layer(x), nn.functional.linear(x, weight, bias))
    strided = torch.randn(64, 7).to(torch.bfloat16).T
    assert torch.equal(layer(strided), nn.functional.linear(strided, weight, bias))
    assert layer.stored_bytes == 0.5625 * layer.dense_bytes
    assert "backend=reference" in repr(layer)


def test_its_state_is_the_canonical_format():
    packed = pack24(random_24(24, 16))
    state = Sparse24Linear(packed, None, policy=policy()).state_dict()
    assert state.keys() == {"weight.values24", "weight.codes24"}  # the names of the files
    assert torch.equal(state["weight.values24"], packed.values)


def test_a_state_is_taken_up():
    first, second = (pack24(random_24(24, 16, seed=seed)) for seed in (1, 2))
    biases = [torch.full((24,), value, dtype=torch.bfloat16) for value in (1.0, 2.0)]
    source = nn.Sequential(Sparse24Linear(first, biases[0], policy=policy()))
    target = nn.Sequential(Sparse24Linear(second, biases[1], policy=policy()))
    x = torch.randn(3, 64).to(torch.bfloat16)
    assert not torch.equal(target(x), source(x))
    state = {name: value.clone() for name, value in source.state_dict().items()}
    target.load_state_dict(state)
    assert torch.equal(target(x), source(x))
    for value in state.values():
        value.zero_()  # the layer has its own
    assert torch.equal(target(x), source(x))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"0.weight.codes24": None}, "Missing key.*0.weight.codes24"),
        ({"0.weight": torch.zeros(1)}, "Unexpected key.*0.weight"),
        ({"0.weight.codes24": torch.zeros(24, 8, dtype=torch.uint8)}, "0.weight is not a packed"),
        ({"0.weight.values24": torch.zeros(24, 32, dtype=torch.float16)}, "float16 matrix"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change, says):
    target = nn.Sequential(Sparse24Linear(pack24(random_24(24, 16)), None, policy=policy()))
    state = {k: v for k, v in {**target.state_dict(), **change}.items() if v is not None}
    before = target[0].packed()
    with pytest.raises(RuntimeError, match=says):
        target.load_state_dict(state)
    assert torch.equal(target[0].packed().values, before.values)


def test_gradients_pass_through():
    weight = random_24(8, 4)
    x = torch.randn(3, 16).to(torch.bfloat16).requires_grad_()
    Sparse24Linear(pack24(weight), None, policy=policy())(x).sum().backward()
    assert torch.equal(x.grad, weight.sum(0).expand(3, 16).to(torch.bfloat16))


def test_a_bias_of_another_dtype_is_refused():
    with pytest.raises(IncompatibleData, match="the bias is torch.float32"):
        Sparse24Linear(pack24(random_24(8, 4)), torch.zeros(8), policy=policy())


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "falcon"])
def test_a_model_runs_packed_and_comes_back(architecture):
    model = pruned(architecture)
    before, weights = model(tiny_tokens()).logits, hash_weights(model)
    linears = find_linears(model)
    conversion = convert(model, linears, policy=policy())
    assert len(conversion.layers) == len(linears) and not conversion.dense
    assert conversion.stored_bytes == 0.5625 * conversion.dense_bytes
    assert conversion.count(512) == {"reference": len(linears)}
    assert torch.allclose(model(tiny_tokens()).logits, before, rtol=0.02, atol=0.02)
    conversion.restore()
    assert hash_weights(model) == weights
    assert torch.equal(model(tiny_tokens()).logits, before)


def test_no_layer_is_there_twice():
    """When a layer is packed, those before it have no dense weight any more."""
    model = pruned()
    linears = find_linears(model)
    convert(model, linears, policy=policy())
    assert all(linear.module.weight is None for linear in linears)
    names = [name for name, _ in model.named_parameters()]
    assert not [name for name in names if "proj" in name]


def test_what_is_not_2_4_stays_dense_and_is_listed():
    model = pruned()
    linears = find_linears(model)
    linears[3].stored[1, 4:8] = 1
    other = copy.deepcopy(model)
    conversion = convert(other, find_linears(other), policy=policy())
    with pytest.raises(IncompatibleData, match=rf"{linears[3].name} is not 2:4: row 1, columns 4"):
        convert(model, linears, policy=policy(), strict=True)
    assert list(conversion.dense) == [linears[3].name]
    assert "not 2:4: 1 of" in conversion.dense[linears[3].name]
    last = explain(conversion, [1])[-1]
    assert (last.layer, last.backend) == (linears[3].name, "dense")


def test_experts_stay_dense():
    model = tiny_model("mixtral").to(torch.bfloat16)
    for linear in find_linears(model):
        if linear.expert is None:
            linear.stored.copy_(random_24(linear.out_features, linear.in_features // 4))
    conversion = convert(model, find_linears(model), policy=policy())
    assert len(conversion.layers) == 12
    assert set(conversion.dense.values()) == {
        "the experts of a mixture are one parameter, not layers"
    }


def test_nothing_to_convert():
    with pytest.raises(IncompatibleData, match="no layer can be run as 2:4"):
        convert(model := tiny_model("llama"), find_linears(model), policy=policy())


# ---------------------------------------------------------------- decompress


def test_layers_share_one_workspace():
    """As large as the largest, which `convert` asks for first."""
    small, large = (FileLayout(pack24(random_24(n, 16))) for n in (8, 32))
    backend = Decompress()
    x = torch.randn(3, 64).to(torch.bfloat16)
    for form in (large, small, large):
        product = backend.build(form).run(x, None)
        assert torch.equal(product, nn.functional.linear(x, unpack24(form.packed())))
    assert backend.workspace.bytes == 32 * 64 * 2
    assert Workspace().bytes == 0


# ---------------------------------------------------------------- run --execute sparse24


def test_a_run_that_is_scored_packed(cli, tiny_run, tmp_path):
    arguments = ["-m", "magnitude", "--sparsity", "2:4", "--dtype", "bfloat16"]
    cli(*tiny_run, *arguments)
    outcome = cli(*tiny_run, *arguments, "--execute", "sparse24", "--save-model", "ck")
    assert "packed 2:4 weights: 21 by reference; 0.5625 of their dense bytes" in outcome.stdout
    results, _ = ResultStore(tmp_path / "results").read()
    packed = next(r for r in results if r.spec.execute == "sparse24")
    masked = next(r for r in results if r.spec.execute == "dense")
    assert packed.scores[0].value == pytest.approx(masked.scores[0].value, rel=1e-3)
    assert packed.model.evaluated_sha256 == masked.model.evaluated_sha256
    assert packed.execution.backends == {"reference": 21}
    assert packed.execution.ppl_difference == 0 and masked.execution is None
    assert packed.spec_id != masked.spec_id
    assert "execute" not in json.loads(masked.spec.canonical_json())
    assert "execute" in cli("compare", "--results-dir", tmp_path / "results").stdout
    again = cli("run", "-M", "ck", *tiny_run[3:], "-m", "dense", "--dtype", "bfloat16",
                "--execute", "sparse24", "--json")  # fmt: skip
    document = json.loads(again.stdout)
    assert document["scores"][0]["value"] == packed.scores[0].value


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ("--sparsity 0.5 --dtype bfloat16 --execute sparse24", 2, "does not go with --sparsity"),
        ("--sparsity 4:8 --dtype bfloat16 --execute sparse24", 2, "does not go with --sparsity"),
        ("--sparsity 2:4 --execute sparse24", 2, "does not go with --dtype float32"),
        ("--sparsity 2:4 --execute sparce24", 2, "did you mean 'sparse24'?"),
        ("--sparsity 2:4 --backend triton", 2, "goes with --execute sparse24"),
        (
            "--sparsity 2:4 --dtype bfloat16 --execute sparse24 --backend cslt", 2,
            "the backend cslt cannot be used on cpu",
        ),
    ],
)  # fmt: skip
def test_wrong_executions(cli, tiny_run, arguments, code, says):
    assert says in cli(*tiny_run, "-m", "magnitude", *arguments.split(), code=code).output


def test_a_dense_model_cannot_be_scored_packed(cli, tiny_run):
    arguments = ["-m", "dense", "--dtype", "bfloat16", "--execute", "sparse24"]
    output = cli(*tiny_run, *arguments, code=4).output
    assert "q_proj is not 2:4: row 0, columns 0 to 3 hold" in output
