"""Distillation on tiny models: the loss, what may change, what stays, and stopped trainings."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from prunebench.calibration.training import Training
from prunebench.errors import IncompatibleData, UsageError
from prunebench.models.backward import Backward
from prunebench.models.hashing import hash_weights
from prunebench.models.linears import find_linears
from prunebench.models.out_of_memory import on_batch_halved
from prunebench.models.replay import plain_inference
from prunebench.recovery import join_options, resolve_parts
from prunebench.recovery.distill.loop import Distiller
from prunebench.recovery.distill.loss import DistillLoss
from prunebench.recovery.distill.recoverer import Distill
from prunebench.recovery.distill.weights import FullWeight, LowRankWeight
from prunebench.testing import check_recoverer, tiny_model, tiny_tokens
from prunebench.training.shards import Shards
from tests.distillation import distill_of, pruned_model, train
from tests.training_runs import Killed, stop_after


def masks_of(model):
    return {linear.name: linear.stored != 0 for linear in find_linears(model)}


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("eta", [0.0, 0.67, 1.0])
def test_the_loss_and_its_gradient_are_those_of_plain_torch(eta, temperature):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 7, 11, generator=generator, dtype=torch.float64)
    targets = torch.randint(11, (7,), generator=generator)
    leaf = student.clone().requires_grad_()
    divergence = functional.kl_div(
        (leaf / temperature).log_softmax(-1), (teacher / temperature).softmax(-1), reduction="sum"
    )
    entropy = functional.cross_entropy(leaf, targets, reduction="sum")
    expected = eta * temperature**2 * divergence + (1 - eta) * entropy
    expected.backward()
    loss = DistillLoss(eta, temperature)
    value, gradient = loss(student.float(), targets, teacher.float() if eta else None)
    assert value == pytest.approx(float(expected.detach()), rel=1e-5)
    assert torch.allclose(gradient.double(), leaf.grad, atol=1e-6)
    assert loss.cross_entropy == pytest.approx(float(entropy.detach()), rel=1e-5)
    if eta:
        assert loss.divergence == pytest.approx(
            temperature**2 * float(divergence.detach()), rel=1e-5
        )


def step_loss(model, dense, windows, *, eta):
    """Return the loss of a step and the gradients of all linears, by plain autograd."""
    pruned = {linear.name: linear.stored.clone() for linear in find_linears(model)}
    for linear in find_linears(model):
        linear.stored.copy_(dense[linear.name])
    teacher = model(input_ids=windows, use_cache=False).logits[:, :-1].detach()
    for linear in find_linears(model):
        linear.stored.copy_(pruned[linear.name])
        linear.module.weight.requires_grad_(True)
    logits = model(input_ids=windows, use_cache=False).logits[:, :-1]
    divergence = functional.kl_div(
        logits.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="sum"
    )
    entropy = functional.cross_entropy(
        logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum"
    )
    loss = (eta * divergence + (1 - eta) * entropy) / windows[:, 1:].numel()
    loss.backward()
    gradients = {linear.name: linear.module.weight.grad for linear in find_linears(model)}
    for linear in find_linears(model):
        linear.module.weight.requires_grad_(False)
        linear.module.weight.grad = None
    return float(loss.detach()), gradients, pruned


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("micro_tokens", [24, 4096])
def test_a_step_has_the_loss_and_the_gradients_of_plain_torch(architecture, micro_tokens):
    model, dense = pruned_model(architecture)
    windows = tiny_tokens(samples=4)
    expected, gradients, pruned = step_loss(model, dense, windows, eta=0.67)
    linears = find_linears(model)
    starts = {x: pruned[x.name].T if x.transposed else pruned[x.name] for x in linears}
    weights = {x: FullWeight(start.contiguous(), 1.0) for x, start in starts.items()}
    for linear in linears:
        linear.stored.copy_(dense[linear.name])
    config = distill_of(micro_tokens=micro_tokens, eta=0.67).filled()
    loop = Distiller(model, weights, config, Shards())
    with plain_inference(model):
        loop._backward.prepare(windows[:1])
        loss = loop._add_gradients(windows)
    assert loss == pytest.approx(expected, rel=1e-5)
    for linear, weight in weights.items():
        gradient = gradients[linear.name].T if linear.transposed else gradients[linear.name]
        kept = torch.where(starts[linear] != 0, gradient, 0)
        assert torch.allclose(weight.parameters["master"].grad, kept, atol=1e-6), linear.name


def test_nothing_moves_where_the_student_is_the_teacher():
    model = tiny_model("llama")
    dense = {linear.name: linear.stored.clone() for linear in find_linears(model)}
    before = hash_weights(model)
    data = Training(tiny_tokens(samples=8), tiny_tokens(samples=3, seed=1))
    report = distill_of(eta=1.0, lr=0.5).recover_model(model, dense, data)
    assert hash_weights(model) == before
    assert all(point.held_out.kl == 0 for point in report.curve if point.held_out)
    assert [point.loss for point in report.curve[1:]] == [0.0] * 5
    assert report.best_step == 0


# ---------------------------------------------------------------- what may change


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_kept_weights_change_and_nothing_else(architecture, rank, dtype):
    start, _ = pruned_model(architecture, dtype=dtype)
    model, report = train(architecture=architecture, rank=rank, dtype=dtype)
    assert report.best_step > 0
    before, after = masks_of(start), masks_of(model)
    lost = {name: int((before[name] & ~after[name]).sum()) for name in before}
    assert not any((after[name] & ~before[name]).any() for name in before)
    assert {name: count for name, count in lost.items() if count} == dict(report.zeros)
    prunable = {linear.parameter_name for linear in find_linears(model)}
    old = dict(start.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is None and not parameter.requires_grad
        assert torch.equal(parameter, old[name]) == (name not in prunable), name
    for linear in find_linears(model):
        assert not torch.signbit(linear.stored[linear.stored == 0]).any()
    losses = [point.held_out.loss for point in report.curve if point.held_out]
    assert min(losses) < losses[0]
    best = next(point for point in report.curve if point.step == report.best_step)
    assert best.held_out.loss == min(losses)


def test_the_loss_that_is_reported_is_that_of_the_weights_that_stay():
    """Measured again, with the final weights in a plain pass; in bfloat16, so rounding counts."""
    model, report = train(dtype=torch.bfloat16, eta=0.0)
    windows = tiny_tokens(samples=3, seed=1)
    logits = model(input_ids=windows, use_cache=False).logits[:, :-1].float()
    loss = functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    best = next(point for point in report.curve if point.step == report.best_step)
    assert best.held_out.loss == pytest.approx(float(loss), rel=1e-3)
    assert best.held_out.kl is None


def test_where_every_step_is_worse_the_start_stays_bit_for_bit():
    start, _ = pruned_model()
    for rank in (0, 2):
        model, report = train(lr=30.0, rank=rank)
        assert report.best_step == 0
        assert hash_weights(model) == hash_weights(start)


def test_a_low_rank_update_is_low_rank_where_weights_are_kept():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(12, 16, generator=generator)
    start[:, ::2] = 0
    weight = LowRankWeight(start, 0.5, rank=2, seed=1, shards=Shards())
    out = torch.empty_like(start)
    weight.write(out)
    assert torch.equal(out, start)
    slope = torch.randn(12, 16, generator=generator)
    gradients = weight.gradients(slope.clone())
    left = torch.randn(12, 2, generator=generator).requires_grad_()
    right = weight.parameters["right"].clone().requires_grad_()
    weight.parameters["left"].copy_(left.detach())
    (torch.where(start != 0, left @ right, 0) * slope).sum().backward()
    assert torch.allclose(gradients["left"], left.grad, atol=1e-5)
    again = weight.gradients(slope.clone())
    assert torch.allclose(again["right"], right.grad, atol=1e-5)
    weight.write(out)
    assert torch.linalg.matrix_rank((out - start)[:, 1::2]) == 2
    assert (out[:, ::2] == 0).all()


def test_the_contract_of_recoverers_holds():
    options = {"steps": 2, "batch": 2, "eval_every": 1}
    outcomes = check_recoverer(distill_of(**options), architectures=("gpt2",))
    assert [outcome.failure for outcome in outcomes if not outcome.passed] == []
    assert len(outcomes) == 5


# ---------------------------------------------------------------- trainings that stop


def test_a_model_that_cannot_be_trained_is_refused_before_it_is_pruned():
    model = tiny_model("llama")
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    data = Training(tiny_tokens(samples=8), tiny_tokens(samples=3, seed=1))
    with pytest.raises(IncompatibleData, match="cannot be summed block by block") as caught:
        distill_of().check_model(model, data)
    assert caught.value.fix == "leave --recover distill out, or use --recover block"


def without_seconds(report):
    return [replace(point, seconds=0.0) for point in report.curve]


@pytest.mark.parametrize("rank", [0, 2])
def test_a_training_that_was_stopped_ends_with_the_same_bits(rank, tmp_path):
    whole, report = train(rank=rank)
    folder, notes = tmp_path / "run", []
    with pytest.raises(Killed):
        train(folder, on_point=stop_after(4), save_every=2, rank=rank)  # step 4 is not saved yet
    model, resumed = train(folder, notes=notes, save_every=2, rank=rank)
    assert "resumed after step 2" in notes[0]
    assert resumed.resumed == 2 and report.resumed == 0
    assert hash_weights(model) == hash_weights(whole)
    assert without_seconds(report) == without_seconds(resumed)
    assert resumed.best_step == report.best_step > 0


def test_a_loss_that_is_not_finite_ends_the_training_and_its_state_is_saved(tmp_path, monkeypatch):
    real, calls = Backward.add, []

    def broken(self, *args, **options):
        calls.append(real(self, *args, **options))
        return calls[-1] if len(calls) < 3 else float("nan")

    monkeypatch.setattr(Backward, "add", broken)
    with pytest.raises(IncompatibleData, match="loss of the distillation .* at step 3") as caught:
        train(tmp_path / "run", save_every=1)
    assert "the weights are those of step 2" in caught.value.where
    assert "saved in" in caught.value.where and (tmp_path / "run" / "state").is_dir()


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_halved(monkeypatch):
    whole, _ = train(micro_tokens=24)
    real, sizes, halved = Backward.add, [], []

    def small(self, windows, **options):
        sizes.append(len(windows))
        if len(windows) > 1:
            raise torch.OutOfMemoryError("no room")
        return real(self, windows, **options)

    monkeypatch.setattr(Backward, "add", small)
    with on_batch_halved(lambda what, size: halved.append((what, size))):
        model, _ = train()
    assert halved == [("distillation", 2), ("distillation", 1)]
    assert sizes[:3] == [4, 2, 1]
    assert hash_weights(model) == hash_weights(whole)


def test_a_window_that_does_not_fit_is_the_devices_error(monkeypatch):
    def never(self, windows, **options):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Backward, "add", never)
    with pytest.raises(torch.OutOfMemoryError):
        train()


def train_together(rank, folder):
    """One of two processes: distill, and leave the weights and the curve in a file."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        for low in (0, 2):
            model, report = train(folder / f"state-{low}", save_every=5, rank=low)
            weights = {linear.name: linear.stored.clone() for linear in find_linears(model)}
            torch.save({"weights": weights, "best": report.best_step,
                        "losses": [p.held_out.loss for p in report.curve if p.held_out],
                        "processes": report.processes}, folder / f"{low}-{rank}.pt")  # fmt: skip
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path):
    """Up to the order in which gradients are added; both end with the same bits."""
    context = torch.multiprocessing.start_processes(
        train_together, args=(tmp_path,), nprocs=2, join=False, start_method="fork"
    )
    assert any(context.join(timeout=60) for _ in range(10)), "the two processes hang"
    for low in (0, 2):
        model, report = train(rank=low)
        first, second = (
            torch.load(tmp_path / f"{low}-{rank}.pt", weights_only=False) for rank in range(2)
        )
        assert first["processes"] == 2 and first["best"] == report.best_step
        losses = [point.held_out.loss for point in report.curve if point.held_out]
        assert first["losses"] == pytest.approx(losses, rel=1e-4)
        for linear in find_linears(model):
            mine = first["weights"][linear.name]
            assert torch.equal(mine, second["weights"][linear.name])
            assert torch.equal(mine != 0, linear.stored != 0)
            assert torch.allclose(mine, linear.stored, atol=2e-3), linear.name


# ---------------------------------------------------------------- options


def test_the_rate_rises_and_falls_to_zero():
    config = distill_of(steps=10, warmup=0.2).filled()
    factors = [config.factor(step) for step in range(10)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[-1] == pytest.approx(1 / 8)
    assert factors[2:] == sorted(factors[2:], reverse=True)
    assert distill_of(steps=4, warmup=0.0).filled().factor(0) == 1.0


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0}, {"eta": 1.5}, {"eta": -0.1}, {"temperature": 0.0}, {"lr": 0.0}, {"rank": -1},
        {"warmup": 1.0}, {"held_out": 0}, {"preset": "lap"}, {"micro_tokens": 0}, {"seqlen": 1},
    ],
    ids=str,
)  # fmt: skip
def test_values_out_of_range_are_refused(options):
    with pytest.raises(UsageError, match="distill refuses its options"):
        distill_of(**options)


def test_options_of_two_recoverers_are_told_apart():
    given = {"epochs": 1, "block.lr": 0.1, "distill.lr": 0.2, "steps": 7}
    joined = join_options(resolve_parts("block+distill", given, seed=3))
    assert joined["block.epochs"] == 1 and joined["distill.steps"] == 7
    assert (joined["block.lr"], joined["distill.lr"]) == (0.1, 0.2)
    assert joined["distill.seed"] == 3
    # the full name, which messages use, is right for a single one too
    alone = join_options(resolve_parts("block", {"block.lr": 0.1}, seed=3))
    assert alone["lr"] == 0.1 and "block.lr" not in alone
    for name in ("block", "block+distill"):
        with pytest.raises(UsageError, match="'refine' is given twice"):
            resolve_parts(name, {"refine": 1, "block.refine": 2}, seed=0)
    with pytest.raises(UsageError, match="block and distill both have an option 'lr'"):
        resolve_parts("block+distill", {"lr": 1.0}, seed=0)
    with pytest.raises(UsageError, match="no option 'stepz'"):
        resolve_parts("block+distill", {"distill.stepz": 1}, seed=0)
    with pytest.raises(UsageError, match="twice"):
        resolve_parts("block+block", {}, seed=0)


def test_an_option_left_out_comes_from_the_preset():
    assert Distill().filled().steps == 24
    assert Distill(preset="long", steps=3).filled().batch == 64
    filled = Distill().for_run("c4").options()
    assert filled["data"] == "c4" and None not in filled.values()
