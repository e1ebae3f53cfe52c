"""What is chosen among measured settings: the best, and of those that cannot be told from it the gentlest."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from pmet_lightning.evaluation.scores import score_difference
from pmet_lightning.tune.outcome import Outcome
from pmet_lightning.tune.space import DIRECTIONS, LAM_STEPS, Direction, WriteSetting, write_neighbors

Choice = TypeVar("Choice")

TIE = 0.5  # points of Score: a setting that is further below the best one is not its equal, however wide the interval


def search_writes(
    measure: Callable[[WriteSetting], Outcome],
    start: WriteSetting,
    widths: Sequence[int],
    directions: Sequence[Direction] = DIRECTIONS,
) -> dict[WriteSetting, Outcome]:
    """Look for the best way to write targets that are found, one direction after the other.

    Args:
        measure: Writes, and measures what it does.
        start: Where to begin.
        widths: Possible numbers of edited layers.
        directions: Which of ``lam``, ``width`` and ``rule`` may change, in this order.

    Returns:
        All that was measured.
    """
    seen = {start: measure(start)}
    best = start
    for direction in directions:
        moves = True
        while moves:
            near = write_neighbors(best, widths, direction)
            seen |= {write: measure(write) for write in near if write not in seen}
            found = max([best, *near], key=lambda write: rank(seen[write]))
            moves = found != best and direction == "lam"
            best = found
    return seen


def rank(outcome: Outcome) -> tuple[float, float]:
    """The higher the better: the Score, then little damage."""
    return outcome.score, -outcome.damage


def best_of(seen: dict[Choice, Outcome]) -> Choice:
    """The one of highest rank."""
    return max(seen, key=lambda one: rank(seen[one]))


def choose(
    seen: dict[Choice, Outcome], gentleness: Callable[[Choice], tuple[float, ...]]
) -> tuple[Choice, list[Choice]]:
    """The gentlest of those that cannot be told from the best.

    Args:
        seen: What was measured, all on the same records.
        gentleness: Of two that damage as much, the one of which this is smaller is taken.

    Returns:
        It, and all that it was taken from, best first.
    """
    best = best_of(seen)
    equal = [one for one in seen if one == best or is_tie(seen[one], seen[best])]
    equal.sort(key=lambda one: rank(seen[one]), reverse=True)
    return min(equal, key=lambda one: (round(seen[one].damage, 2), *gentleness(one))), equal


def is_tie(outcome: Outcome, best: Outcome) -> bool:
    """Whether one cannot be told from the best: it is less than half a point below, and no further beyond chance."""
    if best.score - outcome.score >= TIE:
        return False
    high = float(score_difference(outcome.rows, best.rows).get("difference_high", math.nan))
    return not high < 0


def at_the_edge(write: WriteSetting) -> bool:
    """Whether λ is the first or last of its values."""
    return write.lam_step in (LAM_STEPS[0], LAM_STEPS[-1])
