"""Logits in parts against all of them at once, which is what torch differentiates by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pmet_lightning.model.logits import Logits
from pmet_lightning.model.scoring import kl_divergence, label_scores

TOKENS, WIDTH, VOCABULARY = 7, 5, 23


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, a head, labels, and how much the loss weighs each token."""
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, WIDTH, generator=generator, dtype=dtype) for n in (TOKENS, VOCABULARY))
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    return hidden.requires_grad_(), head, labels, torch.randn(TOKENS, generator=generator, dtype=dtype)


@pytest.mark.parametrize("most", [1, 3, TOKENS, 100])
def test_parts_have_the_values_and_the_gradient_of_the_whole(most):
    hidden, head, labels, weights = problem()
    clean = torch.randn(TOKENS, VOCABULARY, dtype=hidden.dtype).log_softmax(dim=-1)

    def measure(logits: Tensor, first: int) -> tuple[Tensor, ...]:
        tokens = slice(first, first + len(logits))
        log_p, argmax = label_scores(logits, labels[tokens])
        return log_p + kl_divergence(logits.log_softmax(dim=-1), clean[tokens]), argmax

    found = []
    for logits in (Logits(hidden, lambda part: part @ head.T, most), Logits(hidden @ head.T)):
        value, argmax = logits.measure(measure)
        # squared: what a token's gradient is multiplied by depends on its value
        found.append((value, argmax, *torch.autograd.grad((value.square() * weights).sum(), hidden)))
    for part, whole in zip(*found, strict=True):
        torch.testing.assert_close(part, whole)


def test_nothing_of_the_vocabulary_is_kept_for_the_backward_pass():
    hidden, head, labels, _ = problem()
    kept: list[torch.Size] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    logits = Logits(hidden, lambda part: torch.nn.functional.linear(part, head), 2)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits.measure(lambda part, first: label_scores(part, labels[first : first + len(part)])[:1])
    rows = [shape[0] for shape in kept if shape[-1] == VOCABULARY and shape[0] != WIDTH]  # the head's weight is kept
    assert rows
    assert max(rows) <= 2  # of one part, whose graph goes with it
    assert kept[-1] == (TOKENS, WIDTH)
    assert logits.whole().shape == (TOKENS, VOCABULARY)


@pytest.mark.parametrize("off", ["no_grad", "detached"])
def test_without_a_gradient_none_is_computed(off):
    hidden, head, labels, _ = problem()
    seen: list[bool] = []

    def measure(logits: Tensor, first: int) -> tuple[Tensor, ...]:
        seen.append(logits.requires_grad)
        return label_scores(logits, labels[first : first + len(logits)])

    with torch.set_grad_enabled(off != "no_grad"):
        value, _ = Logits(hidden if off == "no_grad" else hidden.detach(), lambda part: part @ head.T, 3).measure(
            measure
        )
    assert not value.requires_grad
    assert seen == [False] * 3


def test_half_precision_stays_half():
    hidden, head, labels, weights = problem(torch.bfloat16)
    (value,) = Logits(hidden, lambda part: part @ head.T, 2).measure(
        lambda part, first: label_scores(part, labels[first : first + len(part)])[:1]
    )
    assert value.dtype is torch.float32
    (gradient,) = torch.autograd.grad((value * weights).sum(), hidden)
    exact = torch.autograd.grad((label_scores((hidden.float() @ head.float().T), labels)[0] * weights).sum(), hidden)[0]
    assert gradient.dtype is torch.bfloat16
    torch.testing.assert_close(gradient, exact, rtol=0.05, atol=0.05)
