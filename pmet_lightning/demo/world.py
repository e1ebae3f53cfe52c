"""Atlas: a made-up world of persons, cities, companies and products, built from a seed.

Every subject has one or two facts. Some subjects are *witnesses*: no record edits them, so they can serve as
neighbors whose answers must stay. If a neighbor were edited in the same batch, a correct edit would count as a
side effect.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

from pmet_lightning.demo.names import FIRST_WORDS, filler_sentences, last_words
from pmet_lightning.demo.relations import KINDS, RELATIONS, Relation

# Subjects per kind: (those that the records edit, witnesses).
_COUNTS = {"person": (400, 200), "city": (150, 90), "company": (145, 75), "product": (145, 75)}
EDITS = sum(some for some, _ in _COUNTS.values())
_SECOND_FACT_SHARE = 0.12  # of the edited subjects; every witness has two facts
_HELD_OUT_SHARE = 0.4  # of the facts are never trained in the held-out wording of their relation
_FILLERS = 840


@dataclass(frozen=True)
class Subject:
    """A name and what it names.

    Args:
        name: Two words; the last one belongs to this subject alone.
        kind: One of `KINDS`.
        witness: Never edited by the records; only witnesses are used as neighbors.
    """

    name: str
    kind: str
    witness: bool


@dataclass(frozen=True)
class Fact:
    """One true statement.

    Args:
        subject: Name of the subject.
        relation_id: Id of the relation.
        object: The answer, without its leading space.
        held_out: Whether the held-out wording of the relation is excluded from training for this fact.
    """

    subject: str
    relation_id: str
    object: str
    held_out: bool


@dataclass(frozen=True)
class World:
    """Everything that is true in Atlas.

    Args:
        subjects: All subjects, in a fixed order.
        facts: All facts; the first one of a subject comes before its second.
        relations: The relations the facts use.
        fillers: Sentences that say nothing about any subject.
    """

    subjects: tuple[Subject, ...]
    facts: tuple[Fact, ...]
    relations: tuple[Relation, ...]
    fillers: tuple[str, ...]

    @cached_property
    def relation(self) -> dict[str, Relation]:
        """Relations by id."""
        return {relation.id: relation for relation in self.relations}

    def trained_wordings(self, fact: Fact) -> list[str]:
        """Wordings in which the model reads this fact during training."""
        relation = self.relation[fact.relation_id]
        return [w for i, w in enumerate(relation.wordings) if not (fact.held_out and i == relation.held_out)]

    def trained_prompts(self) -> list[tuple[str, str]]:
        """(prompt, object) for every fact in every wording it is trained in."""
        return [(w.format(fact.subject), fact.object) for fact in self.facts for w in self.trained_wordings(fact)]

    def held_out_prompts(self) -> list[tuple[str, str]]:
        """(prompt, object) for every fact in the wording it is never trained in."""
        held = [(fact, self.relation[fact.relation_id]) for fact in self.facts if fact.held_out]
        return [(relation.wordings[relation.held_out].format(fact.subject), fact.object) for fact, relation in held]


def build_world(seed: int = 0, edits: int = EDITS) -> World:
    """Make a world.

    Args:
        seed: Equal seeds give equal worlds.
        edits: About how many subjects may be edited, with the usual shares of kinds; the number of witnesses is fixed.

    Returns:
        Subjects with one or two facts each; the objects of a relation are distributed evenly.
    """
    rng = random.Random(seed)
    subjects = _draw_subjects(rng, edits)
    facts = _draw_facts(subjects, rng)
    return World(subjects, facts, RELATIONS, tuple(filler_sentences(_FILLERS, rng)))


def _draw_subjects(rng: random.Random, edits: int) -> tuple[Subject, ...]:
    counts = {kind: (round(some * edits / EDITS), witnesses) for kind, (some, witnesses) in _COUNTS.items()}
    words = iter(last_words(sum(map(sum, counts.values())), rng))
    return tuple(
        Subject(f"{rng.choice(FIRST_WORDS[kind])} {next(words)}", kind, witness)
        for kind in KINDS
        for witness, count in zip((False, True), counts[kind], strict=True)
        for _ in range(count)
    )


def _draw_facts(subjects: tuple[Subject, ...], rng: random.Random) -> tuple[Fact, ...]:
    # Collected first, so that the objects of a relation are distributed evenly and a subject's answers are independent.
    groups: dict[tuple[Relation, bool], list[tuple[str, int]]] = defaultdict(list)
    for number, subject in enumerate(subjects):
        of_kind = [relation for relation in RELATIONS if relation.kind == subject.kind]
        count = 2 if subject.witness or rng.random() < _SECOND_FACT_SHARE else 1
        for index in range(count):
            # First relations are assigned in rotation; a subject's second relation is a random other one.
            choice = number % len(of_kind) if index == 0 else rng.randrange(len(of_kind))
            groups[of_kind.pop(choice), subject.witness].append((subject.name, 2 * number + index))
    facts: dict[int, Fact] = {}
    for (relation, _), group in groups.items():
        answers = [relation.objects[i % len(relation.objects)] for i in range(len(group))]
        rng.shuffle(answers)
        for (name, order), answer in zip(group, answers, strict=True):
            facts[order] = Fact(name, relation.id, answer, rng.random() < _HELD_OUT_SHARE)
    return tuple(facts[order] for order in sorted(facts))


def training_sentences(world: World, rng: random.Random) -> list[str]:
    """Everything the model reads in one epoch.

    Args:
        world: The world.
        rng: Source of the order.

    Returns:
        Complete sentences in random order: each fact in each of its trained wordings, the kind of each subject
        ("… is a person.", the prompt on which the editor's KL term preserves the model's idea of the subject),
        and the fillers.
    """
    sentences = [f"{prompt} {answer}." for prompt, answer in world.trained_prompts()]
    sentences += [f"{subject.name} is a {subject.kind}." for subject in world.subjects]
    sentences += world.fillers
    rng.shuffle(sentences)
    return sentences


def corpus_text(world: World, seed: int = 0, limit: int = 400_000) -> str:
    """Plain text of the world, for second-moment statistics of the keys.

    Args:
        world: The world.
        seed: Seed of the order.
        limit: Upper bound of the length, in characters.

    Returns:
        One document per line, 5 to 10 sentences each.
    """
    rng = random.Random(seed)
    sentences = training_sentences(world, rng)
    lines: list[str] = []
    size = 0
    while sentences:
        take = rng.randint(5, 10)
        line = " ".join(sentences[:take])
        sentences = sentences[take:]
        size += len(line) + 1
        if size > limit:
            break
        lines.append(line)
    return "\n".join(lines) + "\n"
