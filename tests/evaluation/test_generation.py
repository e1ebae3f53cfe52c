"""Free answers: said in batches as alone, compared as usual, and counted beside the teacher-forced ones."""

from __future__ import annotations

import math

import pytest
import torch

from pmet_lightning.data.encoder import PromptEncoder, load_tokenizer
from pmet_lightning.data.records import Probe
from pmet_lightning.evaluation.generation import contains, first_sentence, greedy_texts, is_exact, normalize_text
from pmet_lightning.evaluation.probes import ProbeResult, RecordResult, score_probes
from pmet_lightning.evaluation.scores import EditScores
from pmet_lightning.model.loading import load_model
from tests.tiny import RECORDS, save_tiny

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "answer", "exact", "inside"),
    [
        (" Paris. It is large.", "Paris", True, True),
        (" the city of Paris\nand", "Paris", False, True),
        (" The Beatles", "beatles", True, True),
        (" Parisian", "Paris", False, False),
        (" New York, U.S.", "New York", False, True),
        ("", "Paris", False, False),
        (" Ice-hockey!", "ice hockey", True, True),
        (" London. Paris.", "Paris", False, True),
        ("北京。它很大。", "北京", True, True),
        (" “北京”", "北京", True, True),
        ("北京市,", "北京", False, True),
        ("上海！北京。", "北京", False, True),
        ("上海", "北京", False, False),
        ("กรุงเทพ", "กรุงเทพ", True, True),
        ("東京タワー です", "東京タワー", False, True),
        ("서울은", "서울", False, False),
    ],
)
def test_answers_are_compared_as_usual(text, answer, exact, inside):
    assert is_exact(text, answer) == exact
    assert contains(text, answer) == inside


def test_natural_stops():
    assert first_sentence("  One two. Three") == "One two."
    assert first_sentence("One 2.5 two") == "One 2.5 two"
    assert first_sentence("one\ntwo") == "one"
    assert normalize_text("The  U.S., an Ape!") == "u s ape"


@pytest.fixture(scope="module", params=["gpt2", "gptj", "llama", "bloom"])
def loaded(request, tmp_path_factory):
    folder = save_tiny(request.param, tmp_path_factory.mktemp(request.param))
    return load_model(folder, "float32"), load_tokenizer(folder)


@pytest.mark.parametrize("budget", [20, 4096])
def test_batches_say_what_each_prompt_alone_does(loaded, budget):
    model, tokenizer = loaded
    prompts = [r["prompt"].replace("{}", r["subject"]) for r in RECORDS]
    found = greedy_texts(model, PromptEncoder(tokenizer), prompts, tokens_per_batch=budget, device=CPU, new_tokens=6)
    for prompt, text in zip(prompts, found, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        for _ in range(6):  # the slow twin: the whole text again for every token
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        expected = ids[0, len(tokenizer(prompt).input_ids) :].tolist()
        end = expected.index(0) if 0 in expected else len(expected)
        assert text == tokenizer.decode(expected[:end], skip_special_tokens=True)


def numbered(records: list[list[ProbeResult]]) -> list[RecordResult]:
    return [RecordResult(i, tuple(record)) for i, record in enumerate(records)]


def test_only_what_was_edited_is_asked_freely(loaded):
    model, tokenizer = loaded
    kinds = ("efficacy", "generalisation", "specificity")
    probes = [[Probe(kind, "The river runs to", "Lisbon", "Rome") for kind in kinds]]
    (found,) = score_probes(model, PromptEncoder(tokenizer), probes, 512, CPU, free_tokens=4)
    assert [result.contains for result in found] == [0.0, 0.0, None]
    (without,) = score_probes(model, PromptEncoder(tokenizer), probes, 512, CPU)
    assert all(result.exact is None for result in without)
    assert [result.success for result in found] == [result.success for result in without]


def test_free_answers_in_the_table():
    generator = torch.Generator().manual_seed(0)
    records = []
    for _ in range(30):
        draw = [bool(x) for x in torch.rand(5, generator=generator) > 0.4]
        records.append(
            [
                ProbeResult("efficacy", float(draw[0]), 0.5, float(draw[1]), float(draw[1] or draw[2])),
                ProbeResult("generalisation", float(draw[3]), 0.5, 0.0, 1.0),
                ProbeResult("generalisation", float(draw[4]), 0.5, 1.0, 1.0),
                ProbeResult("specificity", 1.0, 0.5),
            ]
        )
    scores = EditScores()
    scores.update(numbered(records))
    table = {name: float(value) for name, value in scores.compute().items()}
    efficacy = 100 * sum(r[0].success for r in records) / 30
    free = 100 * sum(r[0].contains for r in records) / 30
    assert math.isclose(table["efficacy"], efficacy)
    assert math.isclose(table["efficacy_contains"], free)
    assert math.isclose(table["efficacy_exact"], 100 * sum(r[0].exact for r in records) / 30)
    assert math.isclose(table["efficacy_gap"], efficacy - free)
    assert table["generalisation_exact"] == 50
    assert table["efficacy_contains_low"] <= free <= table["efficacy_contains_high"]
    assert "specificity_contains" not in table
    assert math.isclose(table["efficacy_magnitude"], 50)


def test_the_best_form_of_an_answer_counts(loaded):
    """Against every form on its own, one row at a time."""
    model, tokenizer = loaded
    answers = ("New Zealand", "Lisbon", "ice hockey")
    probe = Probe("portability", "The river runs to", answers[0], aliases=answers[1:])
    ((found,),) = score_probes(model, PromptEncoder(tokenizer), [[probe]], 512, CPU)
    magnitudes = []
    for answer in answers:
        prompt, ids = tokenizer(probe.prompt).input_ids, tokenizer(f"{probe.prompt} {answer}").input_ids
        with torch.no_grad():
            log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        values = [float(log_probs[i - 1, ids[i]]) for i in range(len(prompt), len(ids))]
        magnitudes.append(math.exp(sum(values) / len(values)))
    assert math.isclose(found.magnitude, max(magnitudes), rel_tol=1e-4)


def test_any_of_several_multihop_questions_is_enough():
    scores = EditScores()
    rows = ((0, 0, 1), (0, 0, 0), (1, 1, 1))
    scores.update(numbered([[ProbeResult("multihop", s, 0.0, 0.0, s) for s in row] for row in rows]))
    table = scores.compute()
    assert float(table["multihop"]) == pytest.approx(200 / 3)
    assert float(table["multihop_contains"]) == pytest.approx(200 / 3)
    assert "score" not in table


def test_intervals_cover_the_truth():
    """Of 95 % intervals about 95 % hold the mean they are of: 200 simulated evaluations of 100 records."""
    generator = torch.Generator().manual_seed(1)
    covered = 0
    for _ in range(200):
        scores = EditScores()
        draws = (torch.rand(100, generator=generator) < 0.7).double().tolist()
        scores.update(numbered([[ProbeResult("efficacy", value, 0.0)] for value in draws]))
        table = scores.compute()
        covered += bool(table["efficacy_low"] <= 70 <= table["efficacy_high"])
    assert 0.90 <= covered / 200 <= 0.99
