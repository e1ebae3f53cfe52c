"""Atlas: the world, its records, and the model that ships with the package."""

import dataclasses
import json
import logging
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from pmet_lightning import demo as demo_package
from pmet_lightning.demo import demo
from pmet_lightning.demo.names import filler_sentences
from pmet_lightning.demo.recall import measure_recall
from pmet_lightning.demo.records import records
from pmet_lightning.demo.relations import KINDS, RELATIONS
from pmet_lightning.demo.training import LanguageModelling, batches, pack, train
from pmet_lightning.demo.world import World, build_world, corpus_text, training_sentences
from tests.conftest import mostly_slow

SHIPPED = Path(demo_package.__file__).parent / "atlas"
OPENINGS = ("The ", "Therefore ", "Because ", "I ", "You ")


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(0)


@pytest.fixture(scope="module")
def edits(world: World) -> list[dict[str, Any]]:
    return records(world)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(SHIPPED / "model")


def small(world: World) -> World:
    return dataclasses.replace(world, subjects=world.subjects[:40], facts=world.facts[:40], fillers=world.fillers[:20])


def test_the_world_is_large_enough(world: World) -> None:
    assert len(world.facts) >= 1_500
    assert len(world.subjects) >= 1_200
    assert {fact.relation_id for fact in world.facts} == set(world.relation)
    assert len(world.relation) >= 10
    assert len(set(world.fillers)) == len(world.fillers) >= 500
    for opening in OPENINGS:
        assert sum(filler.startswith(opening) for filler in world.fillers) >= 50


def test_every_subject_has_one_or_two_facts_and_a_last_word_of_its_own(world: World) -> None:
    per_subject = Counter(fact.subject for fact in world.facts)
    assert set(per_subject) == {subject.name for subject in world.subjects}
    assert set(per_subject.values()) == {1, 2}
    assert len({(fact.subject, fact.relation_id) for fact in world.facts}) == len(world.facts)
    assert len({subject.name.split()[-1] for subject in world.subjects}) == len(world.subjects)
    assert {subject.kind for subject in world.subjects} == set(KINDS)
    kinds = {subject.name: subject.kind for subject in world.subjects}
    assert all(kinds[fact.subject] == world.relation[fact.relation_id].kind for fact in world.facts)


@pytest.mark.parametrize("relation", RELATIONS, ids=lambda relation: relation.id)
def test_wordings(relation, world: World) -> None:
    assert len(set(relation.wordings)) >= 6
    assert all(wording.count("{}") == 1 and not wording.endswith(" ") for wording in relation.wordings)
    assert any(wording.startswith("{}") for wording in relation.wordings)
    assert any(not wording.startswith("{}") for wording in relation.wordings)
    assert 6 <= len(set(relation.objects)) <= 12
    assert {fact.object for fact in world.facts if fact.relation_id == relation.id} == set(relation.objects)


def test_no_prompt_has_two_answers() -> None:
    wordings = [wording for relation in RELATIONS for wording in relation.wordings]
    for one in wordings:
        # A wording that goes on where another one ends would be a second way to continue it.
        assert not any(other != one and other.startswith(f"{one} ") for other in wordings)
    assert len(set(wordings)) == len(wordings)


def test_the_held_out_wording_is_not_trained_where_it_is_held_out(world: World) -> None:
    held_out = world.held_out_prompts()
    assert 0.3 < len(held_out) / len(world.facts) < 0.5
    sentences = training_sentences(world, random.Random(0))
    never = tuple(f"{prompt} " for prompt, _ in held_out)
    assert not any(sentence.startswith(never) for sentence in sentences)
    assert {f"{prompt} {answer}." for prompt, answer in world.trained_prompts()} <= set(sentences)
    for relation in RELATIONS:
        flags = {fact.held_out for fact in world.facts if fact.relation_id == relation.id}
        assert flags == {True, False}


def test_equal_seeds_give_equal_worlds_and_others_do_not(world: World) -> None:
    assert build_world(0) == world
    assert build_world(1) != world
    assert records(build_world(3), 5) == records(build_world(3), 5)
    assert records(world, 1) != records(world, 0)
    assert corpus_text(world, 2) == corpus_text(world, 2)


def test_records_have_the_shape_of_counterfact(edits: list[dict[str, Any]]) -> None:
    assert len(edits) >= 800
    assert [edit["case_id"] for edit in edits] == list(range(len(edits)))
    assert len({edit["requested_rewrite"]["subject"] for edit in edits}) == len(edits)
    for edit in edits:
        rewrite = edit["requested_rewrite"]
        assert rewrite["prompt"].count("{}") == 1
        assert rewrite["target_new"]["str"] != rewrite["target_true"]["str"]
        assert rewrite["target_new"]["id"] != rewrite["target_true"]["id"]
        assert len(edit["paraphrase_prompts"]) == 2
        assert len(set(edit["neighborhood_prompts"])) in (5, 6)
        assert len(edit["attribute_prompts"]) == len(edit["generation_prompts"]) == 3


def test_prompts_of_a_record_are_about_what_they_should_be(world: World, edits: list[dict[str, Any]]) -> None:
    answers = dict(world.trained_prompts())
    asked = dict(world.trained_prompts() + world.held_out_prompts())
    relation_of = {
        wording.format(fact.subject): fact.relation_id
        for fact in world.facts
        for wording in world.relation[fact.relation_id].wordings
    }
    edited = {edit["requested_rewrite"]["subject"] for edit in edits}
    for edit in edits:
        rewrite = edit["requested_rewrite"]
        subject, true, new = rewrite["subject"], rewrite["target_true"]["str"], rewrite["target_new"]["str"]
        bare = rewrite["prompt"].format(subject)
        assert answers[bare] == true
        for text in edit["paraphrase_prompts"]:
            filler, prompt = text.split(". ", 1)
            assert f"{filler}." in world.fillers
            assert prompt != bare
            assert asked[prompt] == true
            assert relation_of[prompt] == rewrite["relation_id"]
        for prompts, answer in ((edit["neighborhood_prompts"], true), (edit["attribute_prompts"], new)):
            for prompt in prompts:
                assert answers[prompt] == answer
                assert relation_of[prompt] == rewrite["relation_id"]
                assert not any(name in prompt for name in (subject, *_names_in(prompt, edited)))
        head, tail = rewrite["prompt"].split("{}")
        same = [p for p in edit["neighborhood_prompts"] if p.startswith(head) and p.endswith(tail)]
        assert 2 * len(same) >= len(edit["neighborhood_prompts"])


def _names_in(prompt: str, names: set[str]) -> set[str]:
    words = prompt.replace(",", "").split()
    return {f"{a} {b}" for a, b in zip(words, words[1:], strict=False)} & names


def test_fillers_are_different_sentences() -> None:
    sentences = filler_sentences(210, random.Random(0))
    assert len(set(sentences)) == len(sentences) == 210
    assert all(sentence.endswith(".") and "{" not in sentence for sentence in sentences)


def test_texts_begin_with_a_sentence_and_lose_none(world: World, tokenizer: PreTrainedTokenizerFast) -> None:
    sentences = training_sentences(small(world), random.Random(0))
    texts = [tokenizer.decode(text) for text in pack(sentences, tokenizer, 64)]
    assert all(text.startswith(tuple(sentences)) for text in texts)
    # Only the sentences after the last full text are missing.
    missing = [number for number, sentence in enumerate(sentences) if sentence not in "\n".join(texts)]
    assert len(missing) < 12
    assert missing == list(range(len(sentences)))[len(sentences) - len(missing) :]
    assert sum(not text.startswith(world.fillers) for text in texts) > len(texts) / 2


def test_the_run_is_laid_out_from_its_seed(world: World, tokenizer: PreTrainedTokenizerFast) -> None:
    one, same, other = (batches(small(world), tokenizer, 4, 256, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not torch.equal(one[0], other[0])
    assert {tuple(batch.shape) for batch in one} == {(4, 64), (2, 128)}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", mostly_slow(["gptj", "gpt2", "llama"], ["gptj"]))
@pytest.mark.filterwarnings("ignore")  # other packages' own advice about workers and the like
def test_training_lowers_the_loss_and_writes_a_folder(
    architecture: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[float] = []
    step = LanguageModelling.training_step

    def watched(self: LanguageModelling, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = step(self, batch, batch_idx)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(LanguageModelling, "training_step", watched)
    figures = train(small(world), tmp_path, architecture=architecture, epochs=2, batch_tokens=256)
    assert losses[-1] < losses[0] - 1
    assert figures["tokens"] == 256 * len(losses)
    assert 0 <= figures["held_out"] <= 1
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors"}
    assert names >= {"tokenizer.json", "tokenizer_config.json"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.model_type == architecture
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_demo_refuses_a_folder_with_content(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="new or empty folder"):
        demo(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_demo_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gptj, gpt2, llama"):
        demo(str(tmp_path / "atlas"), architecture="rwkv")
    assert list(tmp_path.iterdir()) == []


def test_shipped_files_are_those_of_seed_zero(world: World, edits: list[dict[str, Any]]) -> None:
    for name, part in demo_package.PARTS.items():
        assert json.loads((SHIPPED / f"{name}.json").read_text(encoding="utf-8")) == edits[part]
    assert sum(len(edits[part]) for part in demo_package.PARTS.values()) == len(edits)
    corpus = (SHIPPED / "corpus.txt").read_text(encoding="utf-8")
    assert corpus == corpus_text(world)
    assert 200_000 < len(corpus) <= 400_000
    assert all(5 <= line.count(".") <= 10 for line in corpus.splitlines())


def test_shipped_files_are_small() -> None:
    assert sum(path.stat().st_size for path in (SHIPPED / "model").iterdir()) <= 12_000_000
    assert (SHIPPED / "records.json").stat().st_size <= 1_200_000


def test_shipped_tokenizer(world: World, tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.padding_side == "right"
    assert tokenizer.bos_token is None
    assert tokenizer("The river")["input_ids"] == tokenizer("The river", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokenizer("Danila speaks, “aloud”.")["input_ids"]) == "Danila speaks, “aloud”."
    pieces = Counter(len(tokenizer(f" {subject.name.split()[-1]}")["input_ids"]) for subject in world.subjects)
    assert set(pieces) == {1, 2}
    assert all(len(tokenizer(f" {name}")["input_ids"]) <= 3 for r in RELATIONS for name in r.objects)


@pytest.mark.slow
def test_the_shipped_model_knows_its_world(world: World, tokenizer: PreTrainedTokenizerFast) -> None:
    model = AutoModelForCausalLM.from_pretrained(SHIPPED / "model").eval()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    rng = random.Random(0)
    trained = rng.sample(world.trained_prompts(), 1_500)
    assert sum(measure_recall(model, tokenizer, trained)) >= 0.98 * len(trained)
    held_out = world.held_out_prompts()
    assert sum(measure_recall(model, tokenizer, held_out)) >= 0.90 * len(held_out)
    in_front = [(f"{rng.choice(world.fillers)} {prompt}", answer) for prompt, answer in held_out]
    assert sum(measure_recall(model, tokenizer, in_front)) >= 0.90 * len(in_front)


def test_recall_is_not_always_true(world: World, tokenizer: PreTrainedTokenizerFast) -> None:
    model = AutoModelForCausalLM.from_pretrained(SHIPPED / "model").eval()
    prompts = world.trained_prompts()[:40]
    wrong = [(prompt, "French" if answer != "French" else "German") for prompt, answer in prompts]
    assert not any(measure_recall(model, tokenizer, wrong, batch_size=7))
    # The order of the answers is that of the questions, whatever their lengths.
    mixed = [pair for pairs in zip(prompts, wrong, strict=True) for pair in pairs]
    assert measure_recall(model, tokenizer, mixed, batch_size=7)[1::2] == [False] * len(wrong)


@pytest.mark.rebuild
@pytest.mark.filterwarnings("ignore")
def test_demo_rebuilds_what_ships(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        demo(str(tmp_path / "atlas"))
    for name in ("records.json", "tuning.json", "spare.json", "corpus.txt", "model/tokenizer.json"):
        assert (tmp_path / "atlas" / name).read_bytes() == (SHIPPED / name).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "atlas" / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "atlas" / "model")
    prompts = build_world(0).trained_prompts()[::10]
    assert sum(measure_recall(model, tokenizer, prompts)) >= 0.98 * len(prompts)
