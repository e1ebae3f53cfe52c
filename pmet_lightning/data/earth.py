"""Earth: records in COUNTERFACT's form, built from a table of real facts (``earth.yaml``).

Every subject belongs to one of three pools: neighbors, which no record edits, and the edits for tuning and for
reporting. What looks drawn is ordered by digests of texts, not by a random generator: it is the same on every machine
and version of Python, and a fact that is added to the table leaves most of the others where they are.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

Pool = Literal["neighbors", "tuning", "reporting"]

CORPUS = "earth-corpus"  # its name where a corpus is expected
TABLE = Path(__file__).with_name("earth.yaml")
_SEED = "earth 0"
_NEIGHBORS, _TUNING = 0.4, 0.25  # of an object's subjects; reporting takes the rest
_LEAST_NEIGHBORS = 3
_NEIGHBORHOOD_PROMPTS = 10
_PARAPHRASES = 2
_FIRST_ID: dict[Pool, int] = {"reporting": 0, "tuning": 10_000}  # no number is in both


@dataclass(frozen=True)
class Relation:
    """One kind of fact.

    Attributes:
        id: Its name in the table.
        prompt: The prompt of an edit, with ``{}`` for the subject; the object follows directly.
        wordings: The same question in other words.
        openings: Beginnings of texts about a subject.
        facts: Subjects by their object.
    """

    id: str
    prompt: str
    wordings: tuple[str, ...]
    openings: tuple[str, ...]
    facts: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Earth:
    """The table.

    Attributes:
        relations: All relations.
        sentences: Sentences that have nothing to do with any fact.
    """

    relations: tuple[Relation, ...]
    sentences: tuple[str, ...]


def read_table() -> Earth:
    """Read the table of facts."""
    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    relations = tuple(_relation(name, fields) for name, fields in table["relations"].items())
    return Earth(relations, tuple(table["sentences"]))


def _relation(name: str, fields: dict[str, Any]) -> Relation:
    facts = {true: tuple(subjects) for true, subjects in fields["facts"].items()}
    return Relation(name, fields["prompt"], tuple(fields["wordings"]), tuple(fields["openings"]), facts)


def records(pool: Pool) -> list[dict[str, Any]]:
    """Build one record for every fact whose subject is in a pool.

    Args:
        pool: ``reporting`` or ``tuning``; their subjects differ.

    Returns:
        Records in COUNTERFACT's form, relations mixed. Neighbors have the same relation and the same true object, and
        no record of either pool edits them. The new object is another one of the relation; each is about equally often
        the new one.
    """
    earth = read_table()
    pools = assign_pools(earth)
    found = {
        f"{relation.id} {record['requested_rewrite']['subject']}": record
        for relation in earth.relations
        for record in _records_of(relation, pool, pools, earth)
    }
    return [{"case_id": number, **found[fact]} for number, fact in enumerate(_mixed(found, pool), _FIRST_ID[pool])]


def neighbor_texts() -> Iterator[dict[str, str]]:
    """Plain text with true facts that no record edits: each neighbor in every wording, in rows with a ``text``."""
    earth = read_table()
    pools = assign_pools(earth)
    for relation in earth.relations:
        for true, subjects in relation.facts.items():
            for subject in (subject for subject in subjects if pools[subject] == "neighbors"):
                for wording in (relation.prompt, *relation.wordings):
                    yield {"text": f"{wording.replace('{}', subject)} {true}."}


def assign_pools(earth: Earth) -> dict[str, Pool]:
    """The pool of each subject, which is the same in all of its relations.

    Rare objects come first: they have the fewest subjects to choose from.
    """
    pools: dict[str, Pool] = {}
    groups = [(relation.id, subjects) for relation in earth.relations for subjects in relation.facts.values()]
    for relation_id, subjects in sorted(groups, key=lambda group: len(group[1])):
        counts = Counter(pools[subject] for subject in subjects if subject in pools)
        for subject in _mixed([subject for subject in subjects if subject not in pools], relation_id):
            pools[subject] = _next_pool(counts, len(subjects))
            counts[pools[subject]] += 1
    return pools


def _next_pool(counts: Counter[Pool], size: int) -> Pool:
    """The first pool that lacks subjects of an object with ``size`` subjects."""
    if counts["neighbors"] < max(_LEAST_NEIGHBORS, int(_NEIGHBORS * size)):
        return "neighbors"
    return "tuning" if counts["tuning"] < int(_TUNING * size) else "reporting"


def _records_of(relation: Relation, pool: Pool, pools: dict[str, Pool], earth: Earth) -> list[dict[str, Any]]:
    objects = {subject: true for true, subjects in relation.facts.items() for subject in subjects}
    edited = _mixed([subject for subject in objects if pools[subject] == pool], relation.id)
    neighbors = {true: [s for s in subjects if pools[s] == "neighbors"] for true, subjects in relation.facts.items()}
    targets = _targets(relation, {subject: objects[subject] for subject in edited})
    return [
        _record(relation, subject, objects[subject], target, neighbors[objects[subject]], earth.sentences)
        for subject, target in targets.items()
    ]


def _targets(relation: Relation, objects: dict[str, str]) -> dict[str, str]:
    """A new object for each subject: of the relation's other ones, one of those that were taken least often."""
    taken = Counter[str]()
    targets = {}
    for subject, true in objects.items():
        others = _mixed([other for other in relation.facts if other != true], f"{relation.id} {subject}")
        targets[subject] = min(others, key=lambda other: taken[other])
        taken[targets[subject]] += 1
    return targets


def _record(
    relation: Relation, subject: str, true: str, target: str, neighbors: Sequence[str], sentences: Sequence[str]
) -> dict[str, Any]:
    fact = f"{relation.id} {subject}"
    paraphrases = zip(_mixed(sentences, fact), _mixed(relation.wordings, fact)[:_PARAPHRASES], strict=False)
    return {
        "requested_rewrite": {
            "prompt": relation.prompt,
            "relation_id": relation.id,
            "subject": subject,
            "target_new": {"str": target},
            "target_true": {"str": true},
        },
        "paraphrase_prompts": [f"{sentence} {wording.replace('{}', subject)}" for sentence, wording in paraphrases],
        "neighborhood_prompts": _neighborhood(relation, _mixed(neighbors, fact)),
        "generation_prompts": [opening.replace("{}", subject) for opening in relation.openings],
    }


def _neighborhood(relation: Relation, neighbors: Sequence[str]) -> list[str]:
    """Distinct prompts about the neighbors in turn, about each of them in another wording every time."""
    wordings = (relation.prompt, *relation.wordings)
    prompts = []
    for number in range(_NEIGHBORHOOD_PROMPTS):
        turn, index = divmod(number, len(neighbors))
        prompts.append(wordings[(turn + index) % len(wordings)].replace("{}", neighbors[index]))
    return prompts


def _mixed(texts: Iterable[str], salt: str) -> list[str]:
    """The texts in the order of their digests: mixed, always the same, and another order for another salt."""
    return sorted(texts, key=lambda text: hashlib.sha256(f"{_SEED} {salt} {text}".encode()).digest())
