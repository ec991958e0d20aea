"""`--weights disk`: the same bits as in memory, block by block, and no block held too long."""

import json

import pytest
import torch

from prunebench.errors import IncompatibleData
from prunebench.evaluate.divergence import Divergence
from prunebench.evaluate.perplexity import PerplexityTask, window_losses
from prunebench.models.activations import MappedActivations
from prunebench.models.disk import load_on_disk
from prunebench.models.hashing import hash_weights
from prunebench.models.journal import RunJournal
from prunebench.models.linears import find_blocks
from prunebench.models.load import load_config, load_model
from prunebench.models.stream import batch_logits
from prunebench.models.walker import BlockWalker
from prunebench.models.weights import weights_of
from prunebench.pruners import METHODS
from prunebench.results.store import ResultStore
from prunebench.sparsity import Sparsity
from prunebench.testing import ARCHITECTURES, FUSED_EXPERTS, tiny_model, tiny_tokens
from tests.conftest import KINDS, slow_beyond

CPU = torch.device("cpu")
PLAIN = [name for name in ARCHITECTURES if name not in FUSED_EXPERTS]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Folders of tiny models, made once."""
    made = {}

    def make(architecture):
        if architecture not in made:
            made[architecture] = tmp_path_factory.mktemp("disk") / architecture
            tiny_model(architecture).save_pretrained(made[architecture])
        return made[architecture]

    return make


def both(folder, tmp_path, *, dtype=torch.float32, placement="device"):
    """The same model in memory and on disk."""
    journal = RunJournal(tmp_path / "kept")
    journal.lock()
    on_disk = load_on_disk(
        folder, load_config(folder), dtype=dtype, device=CPU, journal=journal, placement=placement
    )
    return load_model(folder, dtype=dtype, device=CPU), on_disk


def prune(model, method="wanda", order="joint", sparsity="2:4"):
    pruner = METHODS.make(method, {})
    walker = BlockWalker(model, token_ids=tiny_tokens(), within_block=order, batch_tokens=48)
    return pruner.prune(walker, {x.name: Sparsity.parse(sparsity) for x in walker.linears})


@pytest.mark.parametrize("architecture", slow_beyond({*KINDS, "gemma3"}, PLAIN))
def test_the_same_bits_on_every_architecture(architecture, folder_of, tmp_path):
    resident, on_disk = both(folder_of(architecture), tmp_path, dtype=torch.bfloat16)
    buffers, other = dict(resident.named_buffers()), dict(on_disk.named_buffers())
    assert buffers.keys() == other.keys()
    assert all(torch.equal(buffers[n], other[n]) for n in buffers)
    assert hash_weights(on_disk) == hash_weights(resident)
    windows = tiny_tokens(samples=3)
    assert window_losses(on_disk, windows) == window_losses(resident, windows)
    prune(resident)
    prune(on_disk)
    assert hash_weights(on_disk) == hash_weights(resident)
    assert window_losses(on_disk, windows) == window_losses(resident, windows)


@pytest.mark.parametrize(
    ("method", "order", "placement"),
    [
        ("sparsegpt", "joint", "disk"),
        ("sparsegpt", "sequential", "device"),
        ("wanda", "sequential", "disk"),
        ("random", "joint", "device"),
    ],
)
def test_the_same_bits_with_every_kind_of_method(method, order, placement, folder_of, tmp_path):
    resident, on_disk = both(folder_of("gpt2"), tmp_path, placement=placement)
    reports = [prune(model, method, order) for model in (resident, on_disk)]
    assert hash_weights(on_disk) == hash_weights(resident)
    assert reports[0] == reports[1]


def test_divergence_and_plain_calls_are_the_same(folder_of, tmp_path):
    resident, on_disk = both(folder_of("opt"), tmp_path)
    text = PerplexityTask("p", "d", "o", False, tiny_tokens(samples=3))
    outcomes = []
    for model in (resident, on_disk):
        dense = Divergence.of_dense(model, text, advance=lambda done: None)
        prune(model)
        outcomes.append(dense.score(model, advance=lambda done: None))
    assert outcomes[0] == outcomes[1]
    with torch.no_grad():
        logits = [m(input_ids=text.windows, use_cache=False).logits for m in (resident, on_disk)]
    assert torch.equal(*logits)


def test_only_open_blocks_are_in_memory(folder_of, tmp_path):
    _, model = both(folder_of("llama"), tmp_path)
    blocks = find_blocks(model)[1]

    def present():
        return [i for i, b in enumerate(blocks) if not next(b.parameters()).is_meta]

    seen = []
    walker = BlockWalker(model, token_ids=tiny_tokens())
    for group in walker.groups(stats=True):
        seen.append((group.linears[0].block_index, present()))
    assert all(open_ == [index] for index, open_ in seen)
    assert present() == []
    for _ in batch_logits(model, [tiny_tokens(samples=1)]):
        assert present() == []
    assert not next(model.get_input_embeddings().parameters()).is_meta


def test_a_survey_writes_nothing(folder_of, tmp_path):
    _, model = both(folder_of("llama"), tmp_path)
    for group in BlockWalker(model, token_ids=tiny_tokens()).survey():
        for linear in group.linears:
            linear.stored.zero_()
    assert not list((tmp_path / "kept").glob("block-*"))
    assert hash_weights(model) == hash_weights(tiny_model("llama"))


def test_tied_embeddings(tmp_path):
    """Tied by the config; in the file once, twice, or twice and different."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "tied"
    model = tiny_model("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    embeddings = tensors["model.embed_tokens.weight"]
    for head in (None, embeddings.clone(), embeddings + 1):
        if head is not None:
            save_file(tensors | {"lm_head.weight": head}, file, {"format": "pt"})
        resident, on_disk = both(folder, tmp_path)
        assert hash_weights(on_disk) == hash_weights(resident)
        windows = tiny_tokens(samples=1)
        assert window_losses(on_disk, windows) == window_losses(resident, windows)


@pytest.mark.parametrize("architecture", FUSED_EXPERTS)
def test_fused_experts_are_refused_by_name(architecture, folder_of, tmp_path):
    with pytest.raises(IncompatibleData, match="does not fit .*MoeForCausalLM|MixtralForCausalLM"):
        both(folder_of(architecture), tmp_path)


def test_a_tensor_that_is_missing_is_named(tmp_path, folder_of):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "lacking"
    tiny_model("llama").save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(IncompatibleData, match="lacks 1 tensors") as error:
        both(folder, tmp_path)
    assert "layers.1.mlp.up_proj" in error.value.where


def test_mapped_activations_leave_no_file(tmp_path):
    states = MappedActivations(tmp_path / "maps")
    states.append(torch.arange(6.0).view(1, 2, 3))
    states[0] = states[0] + 1
    assert torch.equal(states[0], torch.arange(1.0, 7.0).view(1, 2, 3))
    assert list((tmp_path / "maps").iterdir()) == []


# ---------------------------------------------------------------- whole runs


def results(tmp_path):
    results, _ = ResultStore(tmp_path / "results").read()
    return {r.cost.weights: r for r in results if r.status == "ok"}


def same(first, second):
    """Two results with the same numbers, whatever they took."""
    drop = {"id", "created_at", "command", "cost"}
    return first.model_dump(exclude=drop) == second.model_dump(exclude=drop)


@pytest.mark.parametrize(
    "options",
    [
        ["-m", "wanda", "--sparsity", "2:4", "--divergence"],
        ["-m", "scheduler", "--activations", "disk", "--set", "allocation.range=auto"],
        ["-m", "dense"],
    ],
    ids=lambda options: options[1],
)
def test_a_run_gives_the_same_result(cli, tiny_run, tmp_path, options):
    for weights in ("resident", "disk"):
        cli(*tiny_run, *options, "--weights", weights, "-q")
    rows = results(tmp_path)
    assert same(rows["resident"], rows["disk"])
    assert not any((tmp_path / "cache" / "runs").iterdir())  # nothing is kept of a finished run


def test_a_checkpoint_from_disk_has_the_weights_that_were_scored(cli, tiny_run, tmp_path):
    run = [*tiny_run, "-m", "wanda", "-q"]
    cli(*run, "--weights", "disk", "--save-model", "out", "--save-masks", "m")
    cli(*run, "--weights", "resident", "--save-masks", "n")
    out = tmp_path / "work" / "out"
    model = load_model(out, dtype=torch.float32, device=CPU)
    assert hash_weights(model) == results(tmp_path)["disk"].model.evaluated_sha256
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in out.glob("*.safetensors")}
    assert (tmp_path / "work" / "m").read_bytes() == (tmp_path / "work" / "n").read_bytes()
    cli("inspect", "out")
    cli("export", "out", "-o", "hub")


def test_what_needs_the_whole_model_is_refused_before_it_is_loaded(cli, tiny_run):
    outcome = cli(*tiny_run, "-m", "gblm", "--weights", "disk", code=2)
    assert "reads gradients" in outcome.output
    options = ["-m", "wanda", "--allocation", "sensitivity", "--weights", "disk"]
    assert "runs the whole model" in cli(*tiny_run, *options, code=2).output


def test_auto_chooses_by_the_memory_that_is_free_and_says_so(cli, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr("prunebench.run.memory.free_memory", lambda device: 100_000)
    outcome = cli(*tiny_run, "-m", "magnitude")
    assert "weights stay on disk" in outcome.output


def test_two_buffers_are_enough_and_no_open_block_loses_its_own(folder_of, tmp_path):
    resident, on_disk = both(folder_of("llama"), tmp_path)
    store = weights_of(on_disk)
    prune(on_disk)
    window_losses(on_disk, tiny_tokens(samples=2))
    store.close()
    assert len({buffer.data_ptr() for buffer in store._pool._free}) == len(store._pool._free) <= 2


def test_blocks_that_are_open_together_do_not_share_a_buffer(folder_of, tmp_path):
    resident, on_disk = both(folder_of("llama"), tmp_path)
    store, blocks = weights_of(on_disk), find_blocks(resident)[1]
    with store.open_block(0) as first, store.open_block(2), store.open_block(1) as other:
        on_disk(input_ids=tiny_tokens(samples=1), use_cache=False)
        for block, dense in ((first, blocks[0]), (other, blocks[1])):
            expected = dense.state_dict()
            assert all(torch.equal(tensor, expected[n]) for n, tensor in block.state_dict().items())
