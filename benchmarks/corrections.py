"""The life of an edit: facts corrected and removed again, compared with one clean run of what is left.

    python benchmarks/corrections.py [--targets replay|spread]

On the bundled model: 200 records of `atlas-records` in ten calls, with the settings of stream.yaml; 50 of them get
another object of their relation in five calls; 20 others are removed. Then all facts that are left are asked, as after
one call with them alone, with pmet-successive.yaml. `--targets replay` has the FFN's delta and λ 300 for the many, 50
for the one; `--targets spread` writes both as pmet.yaml does, the many with λ 1,000. And: what removing a single fact
costs, compared with the call that wrote it, over 50 of 50 facts.
"""

from __future__ import annotations

import argparse
import logging
import random
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch

from pmet_lightning import Edit, Editor
from pmet_lightning.data.readers import read_edits
from pmet_lightning.evaluation.bootstrap import confidence_interval, resample_means
from pmet_lightning.evaluation.generation import says

CHOICES = ("successive", "replay", "spread")


def editor(targets: str, sequence: bool = False) -> Editor:
    """A new editor of the bundled model, with the settings for one edit batch or for many."""
    drift = {"text": None, "max_perplexity": None}
    if targets == "successive":
        return Editor.from_config("stream.yaml" if sequence else "pmet-successive.yaml", drift=drift, device="cpu")
    spread = {"targets": targets, "protect_past": sequence}
    given: dict[str, Any] = {"optimize": "ffn", "clamp": 1.0} if targets == "replay" else {}
    if sequence:
        given["lam"] = 300 if targets == "replay" else 1000
    return Editor.from_config("pmet.yaml", spread=spread, drift=drift, device="cpu", **given)


def corrected(edits: list[Edit], draw: random.Random) -> list[Edit]:
    """The same facts, each with another object of its relation."""
    objects = defaultdict(set)
    for edit in edits:
        objects[edit.relation].add(edit.target)
    return [replace(e, target=draw.choice(sorted(objects[e.relation] - {e.target}) or [e.target])) for e in edits]


def answered(of: Editor, edits: list[Edit]) -> list[float]:
    """100 for each fact that the model says."""
    answers = of.ask([edit.question for edit in edits])
    return [100.0 * says(answer, edit.target) for answer, edit in zip(answers, edits, strict=True)]


def life(edits: list[Edit], targets: str) -> None:
    """The facts after corrections and removals, beside one clean run."""
    draw = random.Random(0)
    many = editor(targets, sequence=True)
    for start in range(0, 200, 20):
        many.edit(edits[start : start + 20], evaluate=False)
    new = corrected(edits[:50], draw)
    for start in range(0, 50, 10):
        many.edit(new[start : start + 10], evaluate=False)
    before = many.edits_written
    many.remove(edits[50:70])
    left = [*edits[70:200], *new]
    clean = editor(targets)
    clean.edit(left, evaluate=False)
    sys.stdout.write(f"{before} edits in 15 calls; of 200 facts {len(many.facts)} left, 50 corrected, 20 removed\n")
    for name, of in (("after corrections and removals", many), ("one clean run", clean)):
        kept, fixed = answered(of, left[:130]), answered(of, left[130:])
        both = torch.tensor(kept + fixed, dtype=torch.float64)
        low, high = confidence_interval(resample_means(both[:, None])[0])
        sys.stdout.write(
            f"{name}: {both.mean():.1f} [{low:.1f}, {high:.1f}] of {len(both)} are said, "
            f"{statistics.mean(kept):.1f} of those never touched, {statistics.mean(fixed):.1f} of the corrected\n"
        )
    gone = answered(many, edits[50:70])
    sys.stdout.write(f"of the 20 removed facts {sum(gone) / 100:.0f} are still said\n")


def cost(edits: list[Edit], targets: str) -> None:
    """The time of a removal beside that of the call."""
    start = time.perf_counter()
    of = editor(targets)
    of.edit(edits[:50])
    whole, times = time.perf_counter() - start, []
    for edit in edits[:50]:
        start = time.perf_counter()
        of.remove(edit)
        times.append(time.perf_counter() - start)
        of.undo()
    sys.stdout.write(
        f"50 facts written and evaluated in {whole:.2f} s; one of them removed in {statistics.median(times):.2f} s "
        f"(median of 50), {whole / statistics.median(times):.1f} times faster\n"
    )


def main(arguments: list[str] | None = None) -> Any:
    """Print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("life", "cost"), help="one part only")
    parser.add_argument("--targets", choices=CHOICES, default="successive", help="--spread.targets")
    given = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    edits = read_edits("atlas-records")
    if given.part != "cost":
        life(edits, given.targets)
    if given.part != "life":
        cost(edits, given.targets)


if __name__ == "__main__":
    sys.exit(main())
