"""All that is asked after a prompt, in batches and with shared keys and values, against one row at a time."""

from __future__ import annotations

import pytest
import torch

from pmet_lightning.data.encoder import PromptEncoder
from pmet_lightning.evaluation import answer_scores as module
from pmet_lightning.evaluation.answer_scores import score_answers
from pmet_lightning.model import prefix_passes as prefix
from tests.conftest import mostly_slow
from tests.tiny import CONFIGS

CPU = torch.device("cpu")
NEW = 5
# Of one token, short, and longer than the windows of 12 tokens of the tiny models.
LONG = "Because nobody came to the harbour in the spring, the old clock was closed for years. The seat of Quillon is in"
PROMPTS = ["X", "The river runs to", "Danila Morvane is a citizen of", LONG]
TARGETS = ["New Zealand", "Norway", "ice hockey", "Lisbon", "New Zealand"]


def with_encoder(found):
    model, _, tokenizer = found
    return model, PromptEncoder(tokenizer)


def questions(encoder):
    """Prompts with several answers, one answer, none, and with and without a free one."""
    pairs = [(prompt, target) for prompt in PROMPTS for target in TARGETS]
    pairs += [("The mother of Danila is", "Norway"), *((prompt, None) for prompt in PROMPTS[:2] + PROMPTS[3:])]
    pairs += [("Nobody knows", None), ("The river runs to", None)]
    return encoder.encode_all([prompt for prompt, _ in pairs], [target for _, target in pairs])


@torch.no_grad()
def alone(model, row):
    """NLL, share of argmax tokens and these, or what the model says: the row by itself."""
    if not row.labels:
        ids = torch.tensor([row.ids])
        said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        return said[0, len(row.ids) :].tolist()
    log_p = model(torch.tensor([row.ids])).logits[0, -len(row.labels) :].log_softmax(-1)
    best = log_p.argmax(-1).tolist()
    nll = -sum(float(log_p[k, label]) for k, label in enumerate(row.labels)) / len(row.labels)
    return nll, sum(a == b for a, b in zip(best, row.labels, strict=True)) / len(row.labels), tuple(best)


def compare(model, encoder, budget):
    rows = questions(encoder)
    scores, said = score_answers(model, rows, encoder.pad_id, budget, CPU, NEW)
    for i, row in enumerate(rows):
        expected = alone(model, row)
        if row.labels:
            assert scores[i].nll == pytest.approx(expected[0], rel=1e-3, abs=1e-5)
            assert (scores[i].accuracy, scores[i].tokens) == expected[1:]
        else:
            assert encoder.decode(said[i]) == encoder.decode(expected)
    assert len(scores) + len(said) == len(rows)


@pytest.mark.parametrize("family", mostly_slow(sorted(CONFIGS), ["gpt2", "gptj", "llama", "gemma2", "falcon", "opt"]))
def test_as_one_row_at_a_time(family, loaded, monkeypatch):
    """All in one batch; in batches of which a group shares one generation; and hardly two rows together."""
    for limit, budget in ((1024, 4096), (40, 4096), (40, 40)):
        monkeypatch.setattr(module, "CPU_TOKENS", limit)
        compare(*with_encoder(loaded(family)), budget)


def test_a_model_with_another_cache(loaded, monkeypatch):
    monkeypatch.setattr(prefix, "is_plain_layer", lambda *_: False)
    compare(*with_encoder(loaded("gpt2")), 100)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repetition_penalty", 50.0),
        ("num_beams", 2),
        ("no_repeat_ngram_size", 1),
        ("use_cache", False),
        ("cache_implementation", "dynamic"),
    ],
)
def test_the_model_s_own_generation_settings_change_nothing(name, value, loaded, monkeypatch):
    model, encoder = with_encoder(loaded("llama"))
    rows = questions(encoder)
    expected = score_answers(model, rows, encoder.pad_id, 4096, CPU, NEW)
    monkeypatch.setattr(model.generation_config, name, value)
    assert score_answers(model, rows, encoder.pad_id, 4096, CPU, NEW) == expected


def test_each_prompt_is_read_once(loaded, monkeypatch):
    """Tokens that go through the model: prompts, answers but for their last tokens, and what is said."""
    model, encoder = with_encoder(loaded("llama"))
    rows = encoder.encode_all([PROMPTS[1]] * 4, [*TARGETS[:3], None])
    tokens = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: tokens.append(inputs[0].numel()))
    score_answers(model, rows, encoder.pad_id, 4096, CPU, NEW)
    handle.remove()
    prompt = len(rows[3].ids)
    tails = sorted(len(row.ids) - prompt for row in rows[:3])
    assert tokens[0] == prompt + tails[-1]
    assert sum(tokens[1:-NEW]) <= 2 * tails[-1]
    assert tokens[-NEW:] == [1] * NEW
