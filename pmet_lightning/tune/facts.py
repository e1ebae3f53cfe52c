"""Facts to tune on and facts to report, which share no subject: shipped ones the model knows, or the user's own."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from pmet_lightning.analysis.facts import facts_of
from pmet_lightning.analysis.known import Candidate, rank_records
from pmet_lightning.data.encoder import PromptEncoder
from pmet_lightning.data.fields import RecordError
from pmet_lightning.data.readers import read_records
from pmet_lightning.data.records import Edit, Probe, ZsreTarget, check_no_contradictions, parse_records

log = logging.getLogger(__name__)

_SAMPLE = 100  # facts of each world that tell which one a model knows
_MOST_ASKED = 400  # facts on each side that a model is asked for
LEAST = 16  # facts on each side: fewer cannot tell settings apart


@dataclass(frozen=True)
class World:
    """Shipped facts.

    Attributes:
        tuning: Records to tune on.
        reporting: Records to report, of other subjects.
        corpus: Text for the second moments.
        text: Text on which drift is measured.
    """

    tuning: str
    reporting: str
    corpus: str
    text: str

    def drift(self, corpus: str | None, subset: str | None) -> dict[str, Any]:
        """The text on which drift is measured: the user's own corpus, as shipped text may say nothing to their model.

        Args:
            corpus: That for the second moments, if it is given.
            subset: Its subset.
        """
        return {"text": self.text} if corpus is None else {"text": corpus, "text_subset": subset}


WORLDS = (
    World("earth-tuning", "earth-records", "sampled-corpus", "earth-corpus"),
    World("atlas-tuning", "atlas-records", "atlas-corpus", "atlas-corpus"),
)
EARTH = WORLDS[0]


@dataclass(frozen=True)
class Item:
    """One record.

    Attributes:
        record: As it is stored, or an edit.
        edits: Its edits; one of MQuAKE may have several.
    """

    record: Any
    edits: tuple[Edit, ...]

    @property
    def subjects(self) -> frozenset[str]:
        """What it is about, whatever the case of its letters."""
        return frozenset(" ".join(edit.subject.casefold().split()) for edit in self.edits)


@dataclass(frozen=True)
class Facts:
    """What a search works on; both parts are in a random order.

    Attributes:
        tuning: Records that settings are chosen on.
        reporting: Records of other subjects, that the figure at the end is from.
        source: Where they come from, in words.
        world: Which shipped ones they are, or whose corpora are used.
    """

    tuning: list[Item]
    reporting: list[Item]
    source: str
    world: World

    @property
    def tuning_edits(self) -> list[Edit]:
        """The edits to tune on."""
        return edits_of(self.tuning)

    @property
    def reporting_edits(self) -> list[Edit]:
        """The edits to report."""
        return edits_of(self.reporting)


def edits_of(items: Iterable[Item]) -> list[Edit]:
    """All edits of some records."""
    return [edit for item in items for edit in item.edits]


def read_items(path: str | Sequence[str], split: str = "train", zsre_target: ZsreTarget = "answers") -> list[Item]:
    """Read records, and check them as for a fit.

    Args:
        path: As for --data.path.
        split: Split of a hub data set.
        zsre_target: The new object of a zsRE record.

    Raises:
        FileNotFoundError: If there is no such file or data set.
        RecordError: If a record is unusable, or two contradict each other.
    """
    read = read_records(path, split=split)
    items = [Item(record, tuple(parse_records(record, number, name, zsre_target))) for number, name, record in read]
    check_no_contradictions(edits_of(items))
    return items


def choose_facts(
    model: nn.Module,
    encoder: PromptEncoder,
    name: str,
    own: Sequence[Item] | None,
    source: str = "facts",
    seed: int = 0,
    tokens_per_batch: int = 8192,
) -> Facts:
    """The facts of a search: the user's own, or shipped ones that the model knows.

    Args:
        model: The language model.
        encoder: Encoder of its tokenizer.
        name: Its name.
        own: The user's records, if there are some.
        source: Where they come from.
        seed: Seed of their order.
        tokens_per_batch: Maximum number of padded tokens in one forward pass.

    Raises:
        RecordError: If there are too few of the user's own.
        ValueError: If the model knows too few of the shipped ones.
    """
    if own is None:
        return known_facts(model, encoder, name, seed, tokens_per_batch)
    facts = own_facts(own, source, seed)
    if asks_about_neighbors([*facts.tuning, *facts.reporting]):
        return facts  # the model need not be asked what it knows
    shipped = read_items(facts.world.tuning)
    return with_bystanders(facts, known_items(model, encoder, shipped, tokens_per_batch))


def own_facts(items: Sequence[Item], source: str, seed: int) -> Facts:
    """Divide records at random into two halves that share no subject.

    Args:
        items: The records.
        source: Where they come from.
        seed: Seed of the division.

    Raises:
        RecordError: If there are too few on a side.
    """
    groups = _by_subjects(items)
    random.Random(seed).shuffle(groups)
    tuning, reporting = list[Item](), list[Item]()
    for group in groups:
        smaller = tuning if len(tuning) <= len(reporting) else reporting
        smaller += group
    if min(len(edits_of(tuning)), len(edits_of(reporting))) < LEAST:
        raise RecordError(
            f"{source}: {len(items)} records about {len(groups)} separate subjects make {len(tuning)} to tune on and "
            f"{len(reporting)} to report; expected at least {LEAST} of each. Give more records (--data.path), or none: "
            "then shipped facts that the model knows are taken"
        )
    return Facts(tuning, reporting, f"{source}, divided at random by subject", EARTH)


def _by_subjects(items: Sequence[Item]) -> list[list[Item]]:
    """Groups of records: those that share a subject, also by way of others, are in one."""
    groups: list[tuple[set[str], list[Item]]] = []
    for item in items:
        joined = set(item.subjects), [item]
        for subjects, members in [group for group in groups if group[0] & item.subjects]:
            joined = joined[0] | subjects, [*members, *joined[1]]
        groups = [group for group in groups if not group[0] & item.subjects] + [joined]
    return [members for _, members in groups]


def known_facts(model: nn.Module, encoder: PromptEncoder, name: str, seed: int, tokens_per_batch: int = 8192) -> Facts:
    """The shipped facts that a model knows: of the worlds, the one of which it knows more.

    Args:
        model: The language model.
        encoder: Encoder of its tokenizer.
        name: Its name.
        seed: Seed of the order of the facts.
        tokens_per_batch: Maximum number of padded tokens in one forward pass.

    Raises:
        ValueError: If it knows too few of either.
    """
    read = {world: _mixed(read_items(world.tuning), seed) for world in WORLDS}
    log.info("asking %s for the facts of %s", name, " and ".join(one.tuning for one in WORLDS))
    sample = {one: known_items(model, encoder, read[one][:_SAMPLE], tokens_per_batch) for one in WORLDS}
    world = max(WORLDS, key=lambda one: len(sample[one]))
    tuning = [*sample[world], *known_items(model, encoder, read[world][_SAMPLE:], tokens_per_batch)]
    asked = _mixed(read_items(world.reporting), seed)
    reporting = known_items(model, encoder, asked, tokens_per_batch)
    taken = frozenset[str]().union(*(item.subjects for item in reporting))
    tuning = [item for item in tuning if not item.subjects & taken]
    if min(len(tuning), len(reporting)) < LEAST:
        counts = [f"{len(sample[one])} of the first {_SAMPLE} in {one.tuning}" for one in WORLDS]
        raise ValueError(
            f"{name} knows too few of the shipped facts ({', '.join(counts)}; {len(reporting)} of {len(asked)} in "
            f"{world.reporting}), expected at least {LEAST} to tune on and {LEAST} to report; give records of your "
            "own: --data.path facts.json"
        )
    log.info("facts that %s knows: %d to tune on, %d to report", name, len(tuning), len(reporting))
    return Facts(tuning, reporting, f"{world.tuning} and {world.reporting}, as far as the model knows them", world)


def _mixed(items: Sequence[Item], seed: int) -> list[Item]:
    """As many as are needed, in a random order."""
    mixed = list(items)
    random.Random(seed).shuffle(mixed)
    return mixed[:_MOST_ASKED]


def known_items(model: nn.Module, encoder: PromptEncoder, items: Sequence[Item], tokens_per_batch: int) -> list[Item]:
    """The records whose old object the model says by itself.

    Args:
        model: The language model.
        encoder: Encoder of its tokenizer.
        items: The records, each with an old object.
        tokens_per_batch: Maximum number of padded tokens in one forward pass.
    """
    candidates = [Candidate(item.record, facts_of(item.record, i, str(i))) for i, item in enumerate(items)]
    ranks = rank_records(model, encoder, candidates, tokens_per_batch)
    return [item for item, rank in zip(items, ranks, strict=True) if rank == 1]


def with_bystanders(facts: Facts, known: Sequence[Item]) -> Facts:
    """Facts whose records ask about neighbors: where they do not, about shipped facts that the model knows.

    Without such questions the search would take whatever writes hardest.

    Args:
        facts: The user's records.
        known: Shipped records that the model knows, with questions about neighbors; none of their subjects is edited.
    """
    asked = [[probe for probe in edit.probes if probe.kind == "specificity"] for edit in edits_of(known)]
    asked = [probes for probes in asked if probes]
    if not asked or asks_about_neighbors([*facts.tuning, *facts.reporting]):
        return facts
    tuning, reporting = (_with_questions(items, asked) for items in (facts.tuning, facts.reporting))
    source = f"{facts.source}; they ask nothing about neighbors, so that specificity is that of shipped facts"
    return replace(facts, tuning=tuning, reporting=reporting, source=source)


def asks_about_neighbors(items: Iterable[Item]) -> bool:
    """Whether every record has a question about a neighbor."""
    return all(any(probe.kind == "specificity" for probe in edit.probes) for edit in edits_of(items))


def _with_questions(items: Sequence[Item], asked: Sequence[Sequence[Probe]]) -> list[Item]:
    found = []
    for number, item in enumerate(items):
        lacking = not asks_about_neighbors([item])
        added = tuple(asked[number % len(asked)]) if lacking else ()
        found.append(replace(item, edits=tuple(replace(edit, probes=(*edit.probes, *added)) for edit in item.edits)))
    return found
