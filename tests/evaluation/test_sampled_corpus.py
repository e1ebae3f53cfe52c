"""Text that the model itself writes: the same for one seed, and never longer than the model can read."""

from __future__ import annotations

from itertools import accumulate, islice

import pytest
import torch

from pmet_lightning.evaluation.sampled_corpus import draw, sampled_texts
from pmet_lightning.targets.target_optimizer import TargetOptimizer
from tests.tiny import save_tiny


@pytest.fixture
def module(tmp_path):
    """GPT-2 of 128 positions, which has no 129th."""
    module = TargetOptimizer(save_tiny("gpt2", tmp_path), layers=[1], dtype="float32")
    module.setup("fit")
    module.configure_model()
    return module


def test_a_model_with_few_positions_writes_texts_too(module):
    """Where a text went on beyond them, its 129th token was an IndexError."""
    assert len(list(islice(sampled_texts(module, 0), 40))) == 40


def test_one_seed_gives_the_same_texts_and_leaves_the_generators_alone(module):
    state = torch.get_rng_state()
    first = list(islice(sampled_texts(module, 1), 3))
    assert torch.equal(torch.get_rng_state(), state)
    assert first == list(islice(sampled_texts(module, 1), 3))
    assert first != list(islice(sampled_texts(module, 2), 3))


def test_a_token_is_drawn_as_often_as_it_is_likely():
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, -torch.inf, 2.0, 1.0, -torch.inf], [5.0, 5.0, -torch.inf, -torch.inf, -torch.inf]])
    drawn = torch.cat([draw(logits) for _ in range(4000)], dim=1)
    shares = torch.stack([(drawn == token).float().mean(dim=1) for token in range(5)], dim=1)
    expected = logits.softmax(dim=-1)
    assert (shares[expected == 0] == 0).all()
    torch.testing.assert_close(shares, expected, rtol=0, atol=4 * 0.5 / 4000**0.5)


def test_what_is_drawn_is_where_the_probabilities_pass_a_random_number():
    torch.manual_seed(1)
    logits = torch.randn(20, 50) * 3
    state = torch.get_rng_state()
    drawn = draw(logits)[:, 0].tolist()
    torch.set_rng_state(state)
    for row, number, token in zip(logits, torch.rand(20, 1)[:, 0].tolist(), drawn, strict=True):
        passed = accumulate(row.double().softmax(dim=-1).tolist())
        assert token == next(i for i, sum_to in enumerate(passed) if sum_to > number)


def test_texts_are_sampled_and_not_the_likeliest(module):
    texts = list(islice(sampled_texts(module, 0), 32))
    assert len(set(texts)) > 30
