"""Learning masks, as a whole: gradients, memory, and which mask is kept."""

import copy
import functools
import math
from dataclasses import dataclass

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prunebench.errors import IncompatibleData, UsageError
from prunebench.models.backward import Backward
from prunebench.models.hashing import hash_weights
from prunebench.models.linears import find_linears
from prunebench.models.replay import plain_inference
from prunebench.models.walker import BlockWalker
from prunebench.pruners import METHODS
from prunebench.pruners.maskllm import relaxation
from prunebench.pruners.maskllm.gradients import FactoredSums
from prunebench.pruners.maskllm.noise import gumbel
from prunebench.pruners.maskllm.optimize import Optimizer
from prunebench.testing import tiny_model, tiny_tokens
from prunebench.training.shards import Shards
from tests.mask_training import HALF, learner_of, masks_of, one_block, train

# ------------------------------------------------------------ gradients


class Collected:
    """The sums of gradients, (out, in), and how many blocks were released."""

    def __init__(self):
        self.gradients, self.blocks = {}, 0

    def fetch(self, linears, *, scale):
        self.scale = scale
        for linear in linears:
            self.gradients.setdefault(
                linear.name, torch.zeros(linear.out_features, linear.in_features)
            )

    def add_product(self, linear, outer, inputs):
        self.gradients[linear.name] += self.scale * (outer.T @ inputs)

    def add_gradient(self, linear, gradient):
        self.gradients[linear.name] += self.scale * (gradient.T if linear.transposed else gradient)

    def release(self):
        self.blocks += 1


def mean_loss(model, windows, parameters=None):
    """Return the mean cross-entropy of windows by a plain forward pass."""
    run = functools.partial(torch.func.functional_call, model, parameters or {})
    logits = run(kwargs={"input_ids": windows, "use_cache": False}).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def gradients_by_autograd(model, windows):
    model = copy.deepcopy(model).requires_grad_()
    loss = mean_loss(model, windows)
    loss.backward()
    gradients = {}
    for linear in find_linears(model):
        gradient = getattr(linear.module, linear.attribute).grad
        gradient = gradient if linear.expert is None else gradient[linear.expert]
        gradients[linear.name] = gradient.T if linear.transposed else gradient
    return float(loss.detach()), gradients


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "falcon"])
def test_windows_in_batches_have_the_gradients_of_autograd(architecture):
    model, windows = tiny_model(architecture), tiny_tokens(samples=5, seqlen=12)
    loss, expected = gradients_by_autograd(model, windows)
    for batch in (1, 2):
        sums = Collected()
        with plain_inference(model):
            backward = Backward(model, find_linears(model), sums)
            backward.prepare(windows[:1])
            got = backward.add(windows[:2], batch=batch, scale=0.4) * 0.4
            got += backward.add(windows[2:], batch=batch, scale=0.6) * 0.6
            sums_of_losses = backward.losses(windows, batch=batch)
        assert math.isclose(got, loss, rel_tol=1e-5)
        assert math.isclose(sum(sums_of_losses) / windows[:, 1:].numel(), loss, rel_tol=1e-5)
        assert sums.blocks == 6
        assert sums.gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            assert torch.allclose(sums.gradients[name], gradient, atol=1e-6, rtol=1e-3), name


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_a_large_step_loses_no_gradient_in_float16(architecture):
    """A token of the paper's steps weighs 2^-20, and float16 ends at 2^-24."""
    windows = tiny_tokens(samples=2, seqlen=24)

    def gradients(dtype, scale):
        model = tiny_model(architecture).to(dtype)
        sums = FactoredSums(Shards(), torch.float32)
        with plain_inference(model):
            backward = Backward(model, find_linears(model), sums)
            backward.prepare(windows[:1])
            backward.add(windows, batch=2, scale=scale)
        owned = sums.owned.items()
        return (
            torch.cat([found.gradient.flatten() for _, found in owned]),
            torch.cat([found.rows for linear, found in owned if linear.expert is None]),
        )

    whole, rows = gradients(torch.float32, 1.0)
    share = windows[:, 1:].numel() / (256 * 4096)
    gradient, squares = gradients(torch.float16, share)
    gradient, squares = gradient.double() / share, squares.double() / share**2
    assert torch.allclose(gradient, whole.double(), rtol=0.02, atol=0.02 * whole.abs().max())
    assert float(torch.cosine_similarity(gradient, whole.double(), dim=0)) > 0.999
    assert torch.allclose(squares, rows.double(), rtol=0.05)
    # a power of two: where nothing is lost, nothing is rounded either
    half, _ = gradients(torch.float32, 0.5)
    assert torch.equal(2 * half, whole)


@dataclass(frozen=True)
class Descent(Optimizer):
    """Plain gradient descent: what a step does to the logits is the gradient itself."""

    clip: float = 0.0

    def step(self, layer, directions, how, *, rate, unit, count=None):
        for part, gradient in directions:
            layer.logits[:, part] -= rate / unit * gradient


def masked(model, learner, logits, how):
    """Return the masked parameters that the model runs with, by name, with a graph."""
    made = {}
    for linear, layer in learner.layers.items():
        drawn = gumbel(torch.arange(layer.logits.shape[1]), 6, seed=how.seed, step=how.step,
                       layer=layer.index)  # fmt: skip
        y = ((how.scale * logits[linear.name] + how.noise * drawn) / how.temperature).softmax(0)
        soft = linear.read() * (y.T @ layer.table).view(linear.out_features, linear.in_features)
        stored = getattr(linear.module, linear.attribute)
        whole = made.setdefault(linear.parameter_name, torch.zeros_like(stored))
        if linear.expert is None:
            made[linear.parameter_name] = soft.T if linear.transposed else soft
        else:
            whole[linear.expert] = soft.T if linear.transposed else soft
    return made


@pytest.mark.parametrize(
    ("architecture", "samples", "steps"), [("llama", 1, 1), ("gpt2", 2, 2), ("mixtral", 2, 1)]
)
def test_steps_descend_along_the_gradient_that_autograd_finds(
    architecture, samples, steps, monkeypatch
):
    monkeypatch.setattr(relaxation, "_CHUNK_LOGITS", 2000)
    model, windows = tiny_model(architecture), tiny_tokens(samples=8, seqlen=12)
    learner = learner_of(
        model, optimizer=Descent(), reward=1e-3, noise_samples=samples, micro_tokens=24
    )
    logits = {linear.name: layer.logits.clone() for linear, layer in learner.layers.items()}
    with plain_inference(model):
        learner._backward.prepare(windows[:1])
        for step in range(steps):
            got = learner._step(step, windows)
            leaves = {name: value.requires_grad_() for name, value in logits.items()}
            losses, objective = [], 0.0
            for draw, part in enumerate(learner._windows(step, windows).chunk(samples)):
                how = learner.schedule.relaxation(step, seed=5, draw=step * samples + draw)
                with torch.enable_grad():
                    weights = masked(model, learner, leaves, how)
                    losses.append(mean_loss(model, part, weights))
                    squares = sum(weight.square().sum() for weight in weights.values())
                    objective = objective + (losses[-1] - how.reward * squares) / samples
            objective.backward()
            assert math.isclose(
                got, sum(map(float, [loss.detach() for loss in losses])) / samples, rel_tol=1e-5
            )
            logits = {name: (leaf - 30.0 * leaf.grad).detach() for name, leaf in leaves.items()}
    moved = False
    for linear, layer in learner.layers.items():
        assert torch.allclose(layer.logits, logits[linear.name], atol=2e-4, rtol=1e-3), linear.name
        moved |= bool((layer.logits - leaves[linear.name]).abs().max() > 0.01)
    assert moved


def test_the_factored_curvature_does_not_depend_on_micro_batches_or_draws():
    model, windows = one_block(), tiny_tokens(samples=4, seqlen=12)
    windows = windows[:1].expand(4, 12).contiguous()  # each draw then sees the same text
    made = []
    for options in ({}, {"micro_tokens": 12}, {"noise_samples": 2}):
        learner = learner_of(model, optimizer=Descent(), noise=0.0, curvature=1e3, **options)
        with plain_inference(model):
            learner._backward.prepare(windows[:1])
            learner._step(0, windows)
        made.append(torch.cat([layer.logits.flatten() for layer in learner.layers.values()]))
    for other in made[1:]:
        assert torch.allclose(made[0], other, atol=1e-4, rtol=1e-3)


# ------------------------------------------------------------ memory


class Fresh(TorchDispatchMode):
    """The element counts of all tensors that operations make, but for views of known ones."""

    def __init__(self, known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.largest = 0
        self.of = ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
                continue
            if tensor.untyped_storage().data_ptr() in self.known or tensor.numel() <= self.largest:
                continue
            self.largest, self.of = tensor.numel(), str(func)
        return made


def test_a_step_makes_no_tensor_of_the_size_of_the_logits(monkeypatch):
    monkeypatch.setattr(relaxation, "_CHUNK_LOGITS", 1500)
    model, windows = tiny_model("llama"), tiny_tokens(samples=2, seqlen=6)
    learner = learner_of(model, batch=2)
    allocated = [parameter.data for parameter in model.parameters()] + [learner._store._workspace]
    for layer in learner.layers.values():
        allocated += [layer.logits, *(packed.values for packed in layer.state.values())]
    largest = max(layer.logits.numel() for layer in learner.layers.values())
    with plain_inference(model):
        learner._backward.prepare(windows[:1])
        with Fresh(allocated) as seen:
            learner._step(0, windows)
            learner._measure(windows)
    assert 64 * 32 <= seen.largest < largest, seen.of  # a gradient has 2/3 of the logits' size
    assert largest == 64 * 32 // 4 * 6


def test_the_dense_weights_are_never_written_while_masks_are_learned():
    model = tiny_model("gpt2")
    before = hash_weights(model)
    learner = learner_of(model)
    learner.learn(
        tiny_tokens(samples=4, seqlen=12), tiny_tokens(samples=2, seqlen=12), eval_every=2
    )
    assert hash_weights(model) == before
    assert learner.done == 4


def magnitude_masks():
    model = one_block()
    walker = BlockWalker(model)
    METHODS.make("magnitude", {}).prune(walker, {linear.name: HALF for linear in walker.linears})
    return masks_of(model)


def test_a_training_that_only_does_harm_ends_with_its_prior():
    """The paper's first noise flips groups: what stays is the prior itself, not where it began."""
    model, report = train(prior_noise=1.0, logit_std=1.0, rate=5.0, optimizer="momentum")
    learned = report.learned
    assert learned.curve[0].changed > 0.02
    if learned.best_step == 0:
        prior = magnitude_masks()
        assert all(torch.equal(keep, prior[name]) for name, keep in masks_of(model).items())
    held = [point.held_out_ppl for point in learned.curve if point.held_out_ppl is not None]
    assert held[0] >= min(held)


def test_the_kept_mask_has_the_best_held_out_score_and_never_one_below_the_prior():
    scores = {}
    for seed in (0, 1):
        model, report = train(steps=6, eval_every=1, optimizer="momentum", rate=0.5, seed=seed)
        points = {point.step: point.held_out_ppl for point in report.learned.curve}
        assert points[report.learned.best_step] == min(points.values()) <= points[0]
        held = tiny_tokens(samples=3, seed=1)
        ppl = math.exp(float(mean_loss(model, held)))
        assert math.isclose(ppl, points[report.learned.best_step], rel_tol=1e-4)
        scores[seed] = points
    assert scores[0][0] == scores[1][0]  # the prior does not depend on the seed


def test_the_curve_says_what_happened_at_every_step():
    points = []
    _, report = train(
        steps=5, eval_every=2, on_point=points.append, temperature=2.0, last_temperature=1.0
    )
    curve = report.learned.curve
    assert points == list(curve)
    assert [point.step for point in curve] == [0, 1, 2, 3, 4, 5]
    assert [point.tokens for point in curve] == [2 * 24 * step for step in range(6)]
    assert [point.held_out_ppl is not None for point in curve] == [
        True,
        False,
        True,
        False,
        True,
        True,
    ]
    assert curve[0].loss is None
    assert curve[0].changed == 0
    assert all(3 < point.loss < 12 for point in curve[1:])
    assert [point.temperature for point in curve] == pytest.approx([2, 2, 1.75, 1.5, 1.25, 1])
    assert all(1 / 6 <= point.certainty <= 1 for point in curve)
    assert [point.seconds for point in curve] == sorted(point.seconds for point in curve)
    assert report.learned.processes == 1


def test_all_windows_are_used_before_any_is_used_again():
    windows = torch.arange(10)[:, None].expand(10, 4).contiguous()
    learner = learner_of(one_block(), batch=4)
    seen = [int(row[0]) for step in range(5) for row in learner._windows(step, windows)]
    first, second = seen[:10], seen[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert first != sorted(first)
    shares = []
    for rank in range(2):
        learner.shards = Shards(rank, 2)
        shares.append([int(row[0]) for row in learner._windows(2, windows)])
    assert sorted(sum(shares, [])) == sorted(seen[8:12])


def test_several_draws_need_windows_for_each():
    with pytest.raises(UsageError, match="shared out"):
        train(batch=3, noise_samples=2)
    _, report = train(batch=2, noise_samples=2, noise=1.0)
    assert report.learned.curve[-1].step == 4


@pytest.mark.parametrize("culprit", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_with_the_state_of_the_step_before(
    culprit, monkeypatch, tmp_path
):
    plain, calls = Backward.add, []

    def add(self, windows, **options):
        calls.append(0)
        loss = plain(self, windows, **options)
        if len(calls) == 3 and culprit == "loss":
            return math.nan
        if len(calls) == 3:
            next(iter(self.sums.owned.values())).gradient[0, 0] = math.inf
            self.sums.total += math.inf
        return loss

    monkeypatch.setattr(Backward, "add", add)
    folder = tmp_path / "run"
    with pytest.raises(IncompatibleData, match=f"the {culprit} is not finite at step 3") as caught:
        train(folder, save_every=10)
    assert str(folder) in caught.value.where
    assert "step 2" in caught.value.where
    monkeypatch.setattr(Backward, "add", plain)
    notes = []
    model, report = train(folder, notes=notes)
    assert "resumed after step 2" in notes[0]
    assert hash_weights(model) == hash_weights(train()[0])
    assert report.events[0].value == 2


def test_weights_that_overflow_are_reported_and_not_learned_from():
    model = one_block()
    model.get_output_embeddings().weight.data[5] = 1e37
    with pytest.raises(IncompatibleData, match="not finite at step 1"):
        train(model=model)
