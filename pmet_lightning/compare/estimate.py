"""How long a comparison takes, estimated from the runs that are finished."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pmet_lightning.compare.plan import Run


def longest_first(runs: Sequence[Run]) -> list[Run]:
    """The runs in an order in which the first ones bound the time of those that follow: most edits first."""
    return sorted(runs, key=lambda run: -run.edits)


def plan_line(runs: Sequence[Run], taken: Mapping[Run, float]) -> str:
    """What is going to be run, and how long that will take if anything is known about it.

    Args:
        runs: All runs.
        taken: Seconds of those that are finished.
    """
    methods, seeds = (len({getattr(run, name) for run in runs}) for name in ("method", "seed"))
    *others, last = map(str, sorted({run.edits for run in runs}))
    counts = f"{', '.join(others)} and {last}" if others else last
    line = f"{len(runs)} runs: {_many(methods, 'method')}, {counts} edits, {_many(seeds, 'seed')}"
    left = [run for run in runs if run not in taken]
    if not left:
        return f"{line}; all are finished"
    if taken:
        return f"{line}; {len(taken)} are finished, {time_line(left, taken)}"
    return f"{line}; the longest come first, and after the first one it is known how long all will take"


def run_line(run: Run) -> str:
    """A run in words."""
    return f"{run.method}, {_many(run.edits, 'edit')}, seed {run.seed}"


def time_line(left: Sequence[Run], taken: Mapping[Run, float]) -> str:
    """The estimated time of the runs that are left, in words."""
    seconds = seconds_left(left, taken)
    if seconds < 90:
        return f"at most about {math.ceil(seconds / 10) * 10} s left"
    if seconds < 5400:
        return f"at most about {math.ceil(seconds / 60)} min left"
    return f"at most about {seconds / 3600:.1f} h left"


def seconds_left(left: Sequence[Run], taken: Mapping[Run, float]) -> float:
    """Each run takes as long as the most similar finished one: of its method if possible, then with the nearest count.

    With the longest runs first this is too much rather than too little.

    Args:
        left: The runs to come.
        taken: Seconds of the finished ones, at least one.
    """

    def like(run: Run) -> float:
        nearest = min(taken, key=lambda done: (done.method != run.method, abs(math.log(done.edits / run.edits))))
        return taken[nearest]

    return math.fsum(map(like, left))


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
