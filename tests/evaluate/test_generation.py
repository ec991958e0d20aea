"""Completions: those of transformers' own `generate`, and what ends or breaks them."""

import copy

import pytest
import torch

from prunebench.errors import IncompatibleData, UsageError
from prunebench.evaluate.generation import Decoding, complete, encode_prompt, same_tokens
from prunebench.results.completions import leaves_at
from prunebench.testing import tiny_model


@pytest.fixture
def tiny(byte_tokenizer):
    return tiny_model("llama"), byte_tokenizer


def own_generate(model, ids, count, **options):
    output = model.generate(
        torch.tensor([ids]), max_new_tokens=count, pad_token_id=0, **options
    )  # [1, prompt + new]
    return tuple(output[0, len(ids) :].tolist())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_greedy_is_what_transformers_generates(architecture, byte_tokenizer):
    model = tiny_model(architecture)
    ids = byte_tokenizer("the quick brown")["input_ids"]
    completion = complete(model, byte_tokenizer, ids, Decoding(20))
    ends = [byte_tokenizer.eos_token_id, model.config.eos_token_id]
    assert completion.token_ids == own_generate(model, ids, 20, do_sample=False, eos_token_id=ends)
    assert completion.prompt_ids == tuple(ids)
    assert completion.steps == len(completion.token_ids) - 1 and completion.seconds > 0
    assert completion.text == byte_tokenizer.decode(completion.token_ids, skip_special_tokens=True)


def test_the_settings_of_a_checkpoint_do_not_count_and_come_back(tiny):
    model, tokenizer = tiny
    ids = tokenizer("the quick brown")["input_ids"]
    plain = complete(model, tokenizer, ids, Decoding(12))
    settings = model.generation_config
    settings.do_sample, settings.temperature, settings.repetition_penalty = True, 5.0, 9.0
    assert complete(model, tokenizer, ids, Decoding(12)).token_ids == plain.token_ids
    assert model.generation_config is settings and settings.repetition_penalty == 9.0


def test_a_seed_repeats_and_the_random_state_is_left_alone(tiny):
    model, tokenizer = tiny
    ids = tokenizer("a")["input_ids"]
    torch.manual_seed(7)
    before = torch.get_rng_state()

    def sampled(seed):
        return complete(model, tokenizer, ids, Decoding(16, temperature=1.0, seed=seed)).token_ids

    first = sampled(1)
    assert sampled(1) == first != sampled(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_end_of_text_token_ends_a_completion(tiny):
    model, tokenizer = tiny
    ids = tokenizer("the quick")["input_ids"]
    whole = complete(model, tokenizer, ids, Decoding(8))
    model.generation_config.eos_token_id = [whole.token_ids[2]]
    shorter = complete(model, tokenizer, ids, Decoding(8))
    end = whole.token_ids.index(whole.token_ids[2]) + 1
    assert shorter.token_ids == whole.token_ids[:end] and shorter.finish == "stop"


def test_the_context_ends_a_completion_and_a_longer_prompt_is_refused(tiny):
    model, tokenizer = tiny[0], copy.deepcopy(tiny[1])
    limit = model.config.max_position_embeddings
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    ids = encode_prompt("x" * (limit - 3), tokenizer, model.config, 256, name="tiny")
    completion = complete(model, tokenizer, ids, Decoding(10))
    assert (completion.finish, len(completion.token_ids)) == ("context", 3)
    with pytest.raises(UsageError, match=f"{limit + 2} tokens, the context of tiny is {limit}"):
        encode_prompt("x" * (limit + 2), tokenizer, model.config, 256, name="tiny")


def test_a_token_without_a_row_is_refused(tiny):
    model, tokenizer = tiny
    with pytest.raises(IncompatibleData, match="vocabulary"):
        encode_prompt("x", tokenizer, model.config, 3, name="tiny")


def test_a_broken_model_writes_nothing(tiny):
    model, tokenizer = tiny
    model.get_input_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(IncompatibleData, match="NaN or infinite"):
        complete(model, tokenizer, [5, 6], Decoding(4))


def test_ctrl_c_leaves_what_was_written(tiny):
    model, tokenizer = tiny
    ids, count = tokenizer("the quick")["input_ids"], 0

    def third(done):
        nonlocal count
        count += done
        if count == 3:
            raise KeyboardInterrupt

    whole = complete(model, tokenizer, ids, Decoding(8))
    part = complete(model, tokenizer, ids, Decoding(8), advance=third)
    assert part.finish == "interrupted" and part.token_ids == whole.token_ids[:3]


@pytest.mark.parametrize(
    ("text", "dense", "at"),
    [
        ("Paris is old", "Paris is old", None),
        ("Paris is old", "Paris is new", 9),
        ("Parma is old", "Paris is old", 0),  # the word, not the letter
        ("Paris is", "Paris is old", 8),  # shorter: at its end
        ("", "Paris", 0),
        ("a, b", "a; b", 1),
    ],
)
def test_where_a_text_leaves_another(text, dense, at):
    assert leaves_at(text, dense) == at


def test_tokens_are_equal_up_to_the_first_that_differs():
    assert same_tokens((1, 2, 3), (1, 2, 4, 5)) == 2
    assert same_tokens((1, 2), (1, 2, 3)) == 2 and same_tokens((), (1,)) == 0
