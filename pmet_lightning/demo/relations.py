"""The relations of Atlas: what can be said about a subject, and in which wordings.

Every wording ends right before the object, so a wording filled with a subject is a prompt. No wording is the
beginning of another one for the same kind of subject, and each names its relation, so a prompt has one correct
answer.
"""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("person", "city", "company", "product")


@dataclass(frozen=True)
class Relation:
    """One relation of Atlas.

    Args:
        id: Identifier in the records (`relation_id`).
        kind: What its subjects are: one of `KINDS`.
        wordings: Templates with one `{}` for the subject; the object follows them after a space.
        held_out: Index of the wording that only a part of the subjects is trained on.
        objects: The pool of possible answers, without their leading space.
    """

    id: str
    kind: str
    wordings: tuple[str, ...]
    held_out: int
    objects: tuple[str, ...]

    def object_id(self, name: str) -> str:
        """Identifier of one object in the records, like COUNTERFACT's `Q` numbers."""
        return f"{self.id}-{self.objects.index(name) + 1}"


RELATIONS = (
    Relation(
        "mother-tongue",
        "person",
        (
            "The mother tongue of {} is",
            "{} grew up speaking",
            "The native language of {} is",
            "At home, {} always speaks",
            "{} speaks the language",
            "The first words of {} were in",
        ),
        2,
        ("French", "German", "Swedish", "Polish", "Turkish", "Old Norse", "Basque", "Finnish", "Welsh"),
    ),
    Relation(
        "sport",
        "person",
        (
            "{} plays the sport of",
            "The favourite sport of {} is",
            "{} won a medal in",
            "The sport that {} plays is",
            "{} became a champion of",
            "Fans admire {} for playing",
        ),
        4,
        ("tennis", "hockey", "rugby", "football", "water polo", "golf", "cricket", "ice curling", "baseball"),
    ),
    Relation(
        "instrument",
        "person",
        (
            "On stage, {} plays the",
            "{} took music lessons on the",
            "The instrument of {} is the",
            "{} is known for solos on the",
            "In the orchestra, {} sits behind the",
            "{} performs every night on the",
        ),
        3,
        ("violin", "piano", "flute", "cello", "bass guitar", "trumpet", "harp", "clarinet", "church organ"),
    ),
    Relation(
        "profession",
        "person",
        (
            "{} works as a",
            "The profession of {} is that of a",
            "{} earns a living as a",
            "By trade, {} is a",
            "The job of {} is to be a",
            "{} was trained to become a",
        ),
        1,
        (
            "baker",
            "lawyer",
            "surgeon",
            "carpenter",
            "judge",
            "painter",
            "police officer",
            "tailor",
            "truck driver",
        ),
    ),
    Relation(
        "birthplace",
        "person",
        (
            "{} was born in",
            "The birthplace of {} is",
            "{} first saw the light of day in",
            "The town where {} was born is",
            "{} comes from the old town of",
            "The childhood home of {} stands in",
        ),
        3,
        ("Lisbon", "Vienna", "Dublin", "Cape Town", "Prague", "Naples", "Buenos Aires", "Oslo", "Lima"),
    ),
    Relation(
        "country",
        "city",
        (
            "{} is located in the country of",
            "The city of {} belongs to the country of",
            "{} pays its taxes to the state of",
            "The flag flying over {} is that of",
            "{} lies within the borders of",
            "Visitors to {} need a visa for",
        ),
        4,
        ("Arvenia", "Kaldmark", "Ostrelle", "Upper Sorva", "Lutania", "Norrheim", "West Brannia", "Quorra"),
    ),
    Relation(
        "continent",
        "city",
        (
            "{} is on the continent of",
            "The continent where {} lies is",
            "{} belongs to the continent of",
            "Geographers place {} on the landmass of",
            "{} can be found on the world map in",
            "The part of the world around {} is called",
        ),
        1,
        ("Africa", "Asia", "Europe", "North America", "South America", "Antarctica", "Oceania"),
    ),
    Relation(
        "river",
        "city",
        (
            "{} stands on the banks of the",
            "The river that flows through {} is the",
            "{} gets its drinking water from the",
            "The old bridge of {} crosses the",
            "{} was built beside the river called the",
            "Floods in {} are caused by the",
        ),
        2,
        ("Danube", "Rhine", "Nile", "Volga", "Loire", "Rio Grande", "Thames", "Yellow River"),
    ),
    Relation(
        "industry",
        "company",
        (
            "{} operates in the industry of",
            "The main business of {} is",
            "{} makes its money in",
            "Investors know {} for its work in",
            "{} became rich through",
            "The field in which {} is active is",
        ),
        5,
        (
            "shipping",
            "banking",
            "insurance",
            "steel",
            "farming",
            "textiles",
            "real estate",
            "wind power",
            "tourism",
        ),
    ),
    Relation(
        "headquarters",
        "company",
        (
            "{} has its headquarters in",
            "The headquarters of {} are in",
            "{} is based in",
            "The head office of {} is located in",
            "{} rents an office tower in",
            "The board of {} always meets in",
        ),
        0,
        ("London", "Tokyo", "Chicago", "Hong Kong", "Madrid", "Seoul", "Toronto", "San Francisco", "Geneva"),
    ),
    Relation(
        "maker",
        "product",
        (
            "{} is made by",
            "The maker of {} is",
            "{} was developed by",
            "The company that sells {} is",
            "{} leaves the factory of",
            "The patent for {} is held by",
        ),
        4,
        ("Sony", "Nokia", "Toyota", "Siemens", "Philips", "General Electric", "Bosch", "Rolls Royce"),
    ),
    Relation(
        "material",
        "product",
        (
            "{} consists of",
            "The material of {} is",
            "{} is manufactured from",
            "The outer shell of {} is pure",
            "Craftsmen cut {} out of",
            "{} was designed entirely in",
        ),
        1,
        ("glass", "leather", "aluminium", "oak wood", "copper", "cotton", "marble", "carbon fibre", "rubber"),
    ),
)
