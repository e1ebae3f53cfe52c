"""How an answer is joined to the text that it continues.

Most languages put a space there. Those that are written without spaces do not, nor does anyone after an opening quote
or bracket.
"""

from __future__ import annotations

import itertools
import re
from typing import Literal

# auto: by what the text ends with and the answer begins with; space: always one; none: the answer as it is.
Join = Literal["auto", "space", "none"]

# Thai, Lao, Tibetan, Burmese, Khmer, kana, Bopomofo, Han with its extensions, half-width kana.
_IS_SPACELESS = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u9fff"
    "\uf900-\ufaff\uff66-\uff9d\U00020000-\U0003ffff]"
)
# A straight quote opens where nothing, a blank, a colon or another opening stands before it.
_OPENING = re.compile(
    "[(\\[{<\u300c\u300e\uff08\u300a\u3008\u3010\u3014\u00ab\u201c\u2018\u201e\u201a\u2039\u00bf\u00a1]$"
    "|(?:^|[\\s(\\[{:=])[\"'`]$"
)


def is_spaceless(text: str) -> bool:
    """Whether some of a text is in a script that puts no space between words."""
    return _IS_SPACELESS.search(text) is not None


def join_of(text: str, answer: str, join: Join = "auto") -> str:
    """What stands between a text and its continuation: a space or nothing.

    Args:
        text: The text.
        answer: Its continuation; one that begins with white space has its join already.
        join: The rule. 'auto' looks at the text's last letter, or at the answer's first where the text has none.
    """
    if join == "none" or answer[:1].isspace() or (join == "auto" and _OPENING.search(text)):
        return ""
    letter = next((c for c in itertools.chain(reversed(text), answer) if c.isalpha()), "")
    return "" if join == "auto" and _IS_SPACELESS.match(letter) else " "
