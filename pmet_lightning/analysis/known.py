"""The command ``known``: keeps the records whose old object a model knows."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pmet_lightning.analysis.options import LoadOptions, RecordOptions, load_with_encoder
from pmet_lightning.model.quantized_base import quiet_casts
from pmet_lightning.utils.files import check_new_file, write_json
from pmet_lightning.utils.types import PositiveInt

if TYPE_CHECKING:
    from torch import nn

    from pmet_lightning.analysis.facts import KnownFact
    from pmet_lightning.data.encoder import PromptEncoder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A record that names an old object.

    Attributes:
        record: The record as it is stored.
        facts: Its facts, each with its old object.
    """

    record: Any
    facts: list[KnownFact]

    @property
    def relation(self) -> str:
        """The relation of its first fact."""
        return self.facts[0].relation or "no relation named"


@quiet_casts()
def known(
    out: str,
    model: LoadOptions = LoadOptions(),  # noqa: B008
    data: RecordOptions = RecordOptions(),  # noqa: B008
    top: PositiveInt = 1,
) -> None:
    """Write those records whose old object the model knows, as they are stored, in a file that fit reads.

    A model knows an object if, after the bare prompt of the edit, each of the object's tokens is among the model's most
    probable next tokens, given those before it: the ``top`` most probable ones. With 1, the model says the object by
    itself. A record of several edits (MQuAKE) needs all of its objects known.

    Args:
        out: The JSON file to write; must not exist.
        model: The model.
        data: The records; those without an old object are left out.
        top: How many of the most probable tokens count.

    Raises:
        FileExistsError: If ``out`` exists.
        FileNotFoundError: If the model or the records do not exist.
        RecordError: If a record is invalid, or none of them has an old object.
        ValueError: If the model knows none of the objects, or the device is unknown.
    """
    check_new_file(out, "--out")
    candidates = _read(data)
    ranks = rank_records(*load_with_encoder(model), candidates, model.tokens_per_batch)
    kept = [candidate for candidate, rank in zip(candidates, ranks, strict=True) if rank is not None and rank <= top]
    if not kept:
        raise ValueError(
            f"{data.path}: {model.model_name} knows none of the {len(candidates)} old objects; give other records "
            f"(--data.path), or a --top above {top}"
        )
    write_json(out, [candidate.record for candidate in kept])
    log.info("%s", "\n".join(_counts(candidates, kept)))
    log.info("the records are in %s", out)


def _read(data: RecordOptions) -> list[Candidate]:
    """The records in which every fact has an old object.

    Raises:
        RecordError: If there is none.
    """
    from pmet_lightning.analysis.facts import facts_of
    from pmet_lightning.data.fields import RecordError
    from pmet_lightning.data.readers import read_records

    records = read_records(data.path, **data.selection())
    read = [Candidate(record, facts_of(record, number, origin)) for number, origin, record in records]
    found = [candidate for candidate in read if all(fact.true is not None for fact in candidate.facts)]
    if not found:
        raise RecordError(
            f"{data.path}: none of the {len(read)} records names an old object, which the model could know; expected "
            "'target_true' (COUNTERFACT), 'ground_truth' (flat records) or 'attribute' (known_facts)"
        )
    if len(found) < len(read):
        log.info("left out: %d of %d records, which name no old object", len(read) - len(found), len(read))
    return found


def rank_records(
    model: nn.Module, encoder: PromptEncoder, candidates: Sequence[Candidate], tokens_per_batch: int
) -> list[int | None]:
    """The largest rank of a token of each record's old objects; ``None`` if one has no token of its own."""
    from pmet_lightning.analysis.facts import answer_ranks, answer_row
    from pmet_lightning.data.encoder import LocationError

    rows, owners = [], []
    lost = set[int]()
    for number, candidate in enumerate(candidates):
        for fact in candidate.facts:
            try:
                rows.append(answer_row(fact, str(fact.true), encoder))
                owners.append(number)
            except LocationError as error:
                log.debug("%s", error)
                lost.add(number)
    worst = Counter[int]()
    for number, rank in zip(owners, answer_ranks(model, rows, encoder.pad_id, tokens_per_batch), strict=True):
        worst[number] = max(worst[number], rank)
    if lost:
        log.info(
            "not known: %d of %d records (subject or old object without a token of its own)", len(lost), len(candidates)
        )
    return [None if number in lost else worst[number] for number in range(len(candidates))]


def _counts(candidates: Sequence[Candidate], kept: Sequence[Candidate]) -> list[str]:
    """How many are known, in all and of each relation."""
    of_all, of_kept = (Counter(candidate.relation for candidate in some) for some in (candidates, kept))
    lines = [f"{relation}: {of_kept[relation]} of {count}" for relation, count in of_all.items()]
    return [f"known: {len(kept)} of {len(candidates)} records", *(f"  {line}" for line in sorted(lines))]
