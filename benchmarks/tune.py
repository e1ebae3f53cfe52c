"""`tune` against random search with the same budget, and against settings that were never searched.

    python benchmarks/tune.py [--model atlas] [--trials 30] [--edits 200] [--seed 0]

Both work on the same model in memory, on the same tuning records and the same second moments; targets are kept for
each. `tune` makes so many trials, and random search (Optuna's RandomSampler), which draws from the same space with all
edits in every trial, gets the CPU time that it took. The table is made on the reporting records; the last column is the
difference of the Scores to that of `tune`, by a paired bootstrap.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna

from pmet_lightning.analysis.options import load_with_encoder
from pmet_lightning.evaluation.scores import METRICS, score_difference
from pmet_lightning.model.loading import set_plain_outputs
from pmet_lightning.report.tables import score_cell
from pmet_lightning.tune.bench import Bench, with_few_neighbors
from pmet_lightning.tune.budget import Budget
from pmet_lightning.tune.command import MomentOptions, TunedModel, base_sections
from pmet_lightning.tune.facts import Facts, choose_facts
from pmet_lightning.tune.outcome import Outcome
from pmet_lightning.tune.search import FEW
from pmet_lightning.tune.space import LAM_STEPS, Scale, Setting, WriteSetting, edited_layers, target_layers, widths_at
from pmet_lightning.tune.study import suggest
from pmet_lightning.tune.tuned import run_search

Sections = dict[str, dict[str, Any]]


def random_settings(bench: Bench, scale: Scale, seed: int) -> Iterator[Sections]:
    """Settings drawn from the space of the search."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    layers = sorted(target_layers(bench.depth, bench.layers))
    while True:
        trial = study.ask()
        target = suggest(trial, layers)
        widths = widths_at(target, edited_layers(bench.depth, bench.layers))
        width = widths[trial.suggest_int("width", 0, 3) % len(widths)]
        rule = trial.suggest_categorical("rule", ["sqrt", "even"])
        lam = trial.suggest_int("lam", LAM_STEPS[0], LAM_STEPS[-1])
        yield scale.sections(Setting(target, WriteSetting(width, rule, lam)))


def best_within(bench: Bench, settings: Iterator[Sections], facts: Facts, edits: int, seconds: float) -> Sections:
    """The best of settings in their order, as far as the CPU time reaches."""
    batch = [with_few_neighbors(edit) for edit in facts.tuning_edits[:edits]]
    start, found = time.process_time(), list[tuple[float, Sections]]()
    for setting in settings:
        found.append((bench.measure(setting, [batch]).score, setting))
        if time.process_time() - start > seconds:
            break
    sys.stdout.write(f"  {len(found)} settings in {time.process_time() - start:.0f} s\n")
    return max(found, key=lambda pair: pair[0])[1]


def show(name: str, outcome: Outcome, reference: Outcome) -> None:
    """A row of the table."""
    cells = [score_cell(outcome.scores, metric) for metric in METRICS]
    difference = score_difference(outcome.rows, reference.rows)
    versus = ", ".join(f"{float(difference[part]):.1f}" for part in ("difference", "difference_low", "difference_high"))
    sys.stdout.write(f"| {name} | {' | '.join(cells)} | {versus} |\n")
    sys.stdout.flush()


def main() -> None:
    """Search in each way, and show what each has found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="atlas")
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--edits", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    logging.disable(logging.INFO)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    options = TunedModel(model_name=given.model, device="cpu")
    lm, encoder = load_with_encoder(options)
    set_plain_outputs(lm)
    facts = choose_facts(lm, encoder, given.model, None, seed=given.seed)
    base = base_sections(options, MomentOptions(), facts, given.seed)
    reporting = facts.reporting_edits[: given.edits]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(lm, encoder.tokenizer, given.model, base, Path(folder) / "tune" / "targets")
        start = time.process_time()
        budget = Budget(trials=given.trials, edits=given.edits)
        tuned = run_search(bench, facts, budget, Path(folder) / "tune", given.seed)
        seconds = time.process_time() - start
        sys.stdout.write(f"  {len(tuned.rows)} settings in {seconds:.0f} s\n")
        show("tune", tuned.reporting, tuned.reporting)
        show("your-model.yaml, layers auto", tuned.untuned, tuned.reporting)
        bench = Bench(lm, encoder.tokenizer, given.model, base, Path(folder) / "random" / "targets")
        scale = bench.prepare(edited_layers(bench.depth, bench.layers), facts.tuning_edits[:FEW])
        chosen = best_within(bench, random_settings(bench, scale, given.seed), facts, given.edits, seconds)
        show("random search", bench.measure(chosen, [reporting]), tuned.reporting)


if __name__ == "__main__":
    main()
