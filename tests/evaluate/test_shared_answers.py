"""Shared beginnings are computed once, and the answers are those of separate rows."""

import pytest
import torch

from prunebench.evaluate.shared_answers import SharedAnswers
from prunebench.evaluate.token_tree import build_tree, shared_batches
from prunebench.testing import ARCHITECTURES, tiny_model

# Bloom has ALiBi and takes no positions; the others compute attention from what they are given.
WITHOUT_TREES = {"bloom"}


def questions(*, context=8, answers=(1, 3, 5, 2), count=6, seed=0):
    """Requests of `count` questions, whose choices share their context."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(length):
        return torch.randint(3, 256, (length,), generator=draw).tolist()

    contexts = [tokens(context) for _ in range(count)]
    return [(asked, tokens(length)) for asked in contexts for length in answers]


@torch.no_grad()
def separately(model, requests):
    """Log-likelihood and greediness by their definition, a row for each request."""
    expected = {}
    for number, (context, answer) in enumerate(requests):
        logits = model(input_ids=torch.tensor([[*context, *answer]])).logits[0].double()
        steps = range(len(context) - 1, len(context) + len(answer) - 1)
        chosen = logits.log_softmax(-1)[list(steps), answer]
        expected[number] = chosen.sum().item(), logits.argmax(-1)[list(steps)].tolist() == answer
    return expected


def ask(model, requests, *, rows=None, longest=128):
    shared = SharedAnswers(model, rows=rows)
    return shared, shared.answer(requests, longest=longest, advance=lambda count: None)


def require_same(answers, expected):
    assert answers.keys() == expected.keys()
    for number, (value, greedy) in expected.items():
        assert answers[number][0] == pytest.approx(value, abs=2e-4)
        assert answers[number][1] == greedy


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_answers_equal_separate_rows(architecture):
    """16 tokens of attention are enough here, so sliding windows hold whole sequences."""
    model, requests = tiny_model(architecture), questions()
    shared, answers = ask(model, requests)
    if architecture in WITHOUT_TREES:
        assert shared.exact is not True and answers == {}
    else:
        assert shared.exact is True
        require_same(answers, separately(model, requests))


def test_a_longer_question_of_a_later_call_is_checked_again():
    """lm-eval asks rolling requests in calls of their own: the first may fit into the window."""
    shared = SharedAnswers(tiny_model("gemma3"))
    short, long = questions(), questions(context=30)
    assert len(shared.answer(short, longest=128, advance=lambda count: None)) == len(short)
    assert shared.exact is True
    assert shared.answer(long, longest=128, advance=lambda count: None) == {}
    assert shared.exact is False


@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "gemma3"])
def test_a_window_shorter_than_the_longest_question_leaves_all_to_plain_rows(architecture):
    shared, answers = ask(tiny_model(architecture), questions(context=30))
    assert shared.exact is False and answers == {}


def test_a_model_with_a_state_is_left_to_plain_rows():
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=256, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0
    )
    assert ask(MambaForCausalLM(config).eval(), questions())[1] == {}


def test_a_state_behind_the_arguments_of_attention_is_seen_too():
    """Takes every argument that trees need, and mixes neighbors of the row all the same."""
    model = tiny_model("llama")
    mixed = model.model.layers[1].mlp

    def roll(module, inputs, output):
        return output + output.roll(1, dims=1)

    mixed.register_forward_hook(roll)
    shared, answers = ask(model, questions())
    assert shared.exact is False and answers == {}


def test_sixteen_bits_are_left_to_plain_rows():
    assert ask(tiny_model("llama").to(torch.bfloat16), questions())[1] == {}


def test_a_batch_size_of_one_is_lm_evals_own_loop():
    assert ask(tiny_model("llama"), questions(), rows=1)[1] == {}


def test_contexts_that_differ_before_a_shared_answer():
    """WinoGrande's form: the beginning is shared, then come another word and the same answer."""
    model, (first, *_) = tiny_model("llama"), questions()
    begin, answer = first[0], [7, 8, 9]
    requests = [([*begin, 5], answer), ([*begin, 6, 11], answer), ([*begin, 5], answer)]
    _, answers = ask(model, requests)
    require_same(answers, separately(model, requests))
    sequences = [[*context, *answer][:-1] for context, answer in requests]
    assert build_tree(sequences).token_ids.numel() == len(begin) + 3 + 4


def test_answers_that_are_beginnings_of_others_and_equal_ones():
    model = tiny_model("gpt2")
    requests = [([3, 4], [5]), ([3, 4], [5, 6]), ([3, 4, 5], [6]), ([3, 4], [5, 6]), ([9], [3])]
    require_same(ask(model, requests)[1], separately(model, requests))


def test_one_choice():
    model, requests = tiny_model("opt"), questions(answers=(4,), count=1)
    require_same(ask(model, requests)[1], separately(model, requests))


def test_what_is_longer_than_the_models_context_or_empty_is_left_out():
    model, requests = tiny_model("llama"), questions(context=20, answers=(2, 9))
    requests += [([], [5]), ([5], [])]
    _, answers = ask(model, requests, longest=24)
    short = [number for number, (_, answer) in enumerate(requests) if len(answer) == 2]
    expected = separately(model, [requests[number] for number in short])
    require_same(answers, dict(zip(short, expected.values(), strict=True)))


def test_no_requests():
    assert ask(tiny_model("llama"), [])[1] == {}


def test_a_greedy_answer_is_seen():
    model = tiny_model("llama")
    context = [3, 4, 5]
    with torch.no_grad():
        best = model(input_ids=torch.tensor([context])).logits[0, -1].argmax().item()
    requests = [(context, [best]), (context, [(best + 1) % 256])]
    answers = ask(model, requests)[1]
    assert [answers[number][1] for number in (0, 1)] == [True, False]


def test_a_batch_that_does_not_fit_is_halved():
    from prunebench.models.out_of_memory import on_batch_halved

    model, requests = tiny_model("llama"), questions()
    expected, halved = separately(model, requests), []

    def refuse(module, args, kwargs):
        if kwargs["input_ids"].shape[1] > 50:
            raise torch.OutOfMemoryError

    with on_batch_halved(lambda what, size: halved.append(size)):
        shared = SharedAnswers(model)
        shared.exact, shared._checked_length = True, 128
        model.register_forward_pre_hook(refuse, with_kwargs=True)
        answers = shared.answer(requests, longest=128, advance=lambda count: None)
    require_same(answers, expected)
    assert halved


def test_every_node_sees_its_ancestors_and_itself_only():
    tree = build_tree([[1, 2, 3], [1, 2, 4, 5], [6]])
    assert tree.token_ids.tolist() == [[1, 2, 3, 4, 5, 6]]
    assert tree.positions.tolist() == [[0, 1, 2, 2, 3, 0]]
    assert [path.tolist() for path in tree.paths] == [[0, 1, 2], [0, 1, 3, 4], [5]]
    sees = [row.nonzero().flatten().tolist() for row in tree.sees]
    assert sees == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 3, 4], [5]]


def test_batches_keep_shared_beginnings_together_within_their_limits():
    sequences = [[question, 9, 9, 9, choice] for choice in (1, 2, 3) for question in (5, 4, 6)]
    batches = list(shared_batches(sequences, tokens=7))
    assert [sorted(sequences[i][0] for i in batch) for batch in batches] == [
        [4] * 3,
        [5] * 3,
        [6] * 3,
    ]
    assert all(len(batch) <= 2 for batch in shared_batches(sequences, tokens=100, rows=2))
    assert sorted(i for batch in batches for i in batch) == list(range(9))
    assert [len(batch) for batch in shared_batches([[1] * 50, [2] * 50], tokens=7)] == [1, 1]
