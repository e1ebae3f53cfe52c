"""Edits of Atlas facts as records in COUNTERFACT's own format."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

from pmet_lightning.demo.world import Fact, World

_SAME_WORDING = 3  # neighborhood prompts in the wording of the edit …
_OTHER_WORDING = 3  # … and in other wordings
_ATTRIBUTES = 3


def records(world: World, seed: int = 0) -> list[dict[str, Any]]:
    """Write one record for every subject that is not a witness.

    Args:
        world: The world.
        seed: Seed of the wordings, the new targets and the order.

    Returns:
        Records in COUNTERFACT's format, shuffled; one per subject. Neighbors are witnesses with the same
        relation and the same true object, so no record of the list changes an answer that another record
        expects to stay.
    """
    rng = random.Random(seed)
    witnesses = {subject.name for subject in world.subjects if subject.witness}
    pool: dict[tuple[str, str], list[Fact]] = defaultdict(list)
    first: dict[str, Fact] = {}
    for fact in world.facts:
        if fact.subject in witnesses:
            pool[fact.relation_id, fact.object].append(fact)
        else:
            first.setdefault(fact.subject, fact)
    facts = list(first.values())
    rng.shuffle(facts)
    return [_record(number, fact, world, pool, rng) for number, fact in enumerate(facts)]


def _record(
    number: int, fact: Fact, world: World, pool: dict[tuple[str, str], list[Fact]], rng: random.Random
) -> dict[str, Any]:
    relation = world.relation[fact.relation_id]
    witnesses = pool[fact.relation_id, fact.object]
    known = world.trained_wordings(fact)
    prompt = rng.choice([w for w in known if len(_trained_in(w, witnesses, world)) >= _SAME_WORDING])
    others = [wording for wording in relation.wordings if wording != prompt]
    rephrased = rng.sample(others, 2)
    free = rng.sample(others, 2)
    target = rng.choice([name for name in relation.objects if name != fact.object])
    return {
        "case_id": number,
        "pararel_idx": relation.wordings.index(prompt),
        "requested_rewrite": {
            "prompt": prompt,
            "relation_id": relation.id,
            "target_new": {"str": target, "id": relation.object_id(target)},
            "target_true": {"str": fact.object, "id": relation.object_id(fact.object)},
            "subject": fact.subject,
        },
        "paraphrase_prompts": [f"{rng.choice(world.fillers)} {w.format(fact.subject)}" for w in rephrased],
        "neighborhood_prompts": _neighbors(prompt, witnesses, world, rng),
        "attribute_prompts": [
            rng.choice(world.trained_wordings(other)).format(other.subject)
            for other in rng.sample(pool[fact.relation_id, target], _ATTRIBUTES)
        ],
        "generation_prompts": [w.format(fact.subject) for w in free] + [f"{fact.subject} is a"],
    }


def _trained_in(wording: str, facts: list[Fact], world: World) -> list[Fact]:
    """The facts that are trained in a wording: the only ones that the model is sure of in it."""
    return [fact for fact in facts if wording in world.trained_wordings(fact)]


def _neighbors(prompt: str, facts: list[Fact], world: World, rng: random.Random) -> list[str]:
    """Half of the prompts in the wording of the edit, half in others, from as many different subjects as possible."""
    facts = rng.sample(facts, len(facts))
    same = _trained_in(prompt, facts, world)[:_SAME_WORDING]
    fresh = [fact for fact in facts if fact not in same]
    rest = (fresh + same)[:_OTHER_WORDING]
    prompts = [prompt.format(fact.subject) for fact in same]
    for fact in rest:
        wordings = [wording for wording in world.trained_wordings(fact) if wording != prompt]
        prompts.append(rng.choice(wordings).format(fact.subject))
    return prompts
