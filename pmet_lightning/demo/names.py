"""Invented names and unrelated sentences for Atlas.

A name is a shared first word and a last word that only one subject has. Names combined from two small
shared pools give keys (at the last token of the subject) that no solve can separate; a unique last word of
one or two tokens gives every subject its own key.
"""

from __future__ import annotations

import itertools
import random


def _words(text: str, separator: str = " ") -> tuple[str, ...]:
    return tuple(text.split(separator))


FIRST_WORDS: dict[str, tuple[str, ...]] = {
    "person": _words(
        "Danila Mirko Selma Oskar Tilda Bruno Irena Pavel Noemi Anton Greta Silas Vera Matteo Liv Jonas "
        "Petra Emil Rosa Hugo Alma Felix Nadia Igor Clara Milan Edda Tomas Lena Viktor Ines Casper Dora "
        "Marek Olga Ruben Stella Janek Mona Elias"
    ),
    "city": _words("Port Saint Fort Mount Lake Castle Abbey Glen Little Inner Outer Bay"),
    "company": _words("House Studio Atelier Banco Casa Groupe Union Maison Royal Trans Messrs Allied"),
    "product": _words("Model Nova Mark Type Super Mini Ultra Turbo Micro Astra Delta Omega"),
}

_ONSETS = _words("B Br D Dr F G Gr H J K Kr L M N P Pr R S Sk St T Tr V Y Z")
_NUCLEI = _words("al ar el en er il in ol or um un os")
_ENDINGS = _words(
    "vane dulo rick sel moth gard linde bor quist tavo mund peska rosh wick dane vik lova mere stad bello "
    "cker nagel forth zani kova dorf ling pello ruva shaw tine vard wen yama zeck bria cott dez fane gosh "
    "hume jano"
)

_NOUNS = _words(
    "river garden market bridge train clock window kitchen letter winter orchard harbour lantern teacher cat "
    "dog forest road table boat storm song field chimney cellar neighbour painting kettle ladder mirror"
)
_DEEDS = _words(
    "was very quiet|looked old and grey|froze early that year|made a strange noise|was closed for a week|"
    "smelled of smoke|disappeared in the fog|was larger than before|came too late|needed some repair|"
    "was covered with snow|stayed the same",
    "|",
)
_TIMES = _words(
    "yesterday|last summer|before breakfast|every Sunday|after the rain|at midnight|in the spring|for years",
    "|",
)
_VERBS = _words("saw painted forgot liked cleaned visited sold missed")
_MAY = _words("should watch|could repair|must not touch|may keep|can easily find|would love", "|")
_WEATHER = _words(
    "it rained|the wind was cold|nobody came|the sun was low|it was late|the door was open|snow fell", "|"
)

_FILLER = (
    ("The {} {}.", (_NOUNS, _DEEDS)),
    ("Therefore the {} {}.", (_NOUNS, _DEEDS)),
    ("Because {}, the {} {}.", (_WEATHER, _NOUNS, _DEEDS)),
    ("I {} the {} {}.", (_VERBS, _NOUNS, _TIMES)),
    ("You {} the {} {}.", (_MAY, _NOUNS, _TIMES)),
    ("Nobody {} the {} {}.", (_VERBS, _NOUNS, _TIMES)),
    ("When {}, we {} the {}.", (_WEATHER, _VERBS, _NOUNS)),
)


def last_words(count: int, rng: random.Random) -> list[str]:
    """Draw pronounceable words, all different, to end the names with.

    Args:
        count: How many.
        rng: Source of randomness.

    Returns:
        `count` capitalized words.
    """
    words = ["".join(parts) for parts in itertools.product(_ONSETS, _NUCLEI, _ENDINGS)]
    return rng.sample(words, count)


def filler_sentences(count: int, rng: random.Random) -> list[str]:
    """Draw sentences that say nothing about any subject.

    The openings are those from which the editor samples its contexts (The, Therefore, Because, I, You), and a
    few others, in equal shares.

    Args:
        count: How many; rounded down to a multiple of the number of templates.
        rng: Source of randomness.

    Returns:
        Distinct complete sentences.
    """
    sentences: list[str] = []
    for template, slots in _FILLER:
        choices = [template.format(*words) for words in itertools.product(*slots)]
        sentences += rng.sample(choices, min(count // len(_FILLER), len(choices)))
    return sentences
