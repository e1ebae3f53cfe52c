"""Text that the model itself writes: the same for one seed, and never longer than the model can read."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from pmet_lightning.evaluation.sampled_corpus import sampled_texts
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
