"""The search for the settings of a model object, as :meth:`~pmet_lightning.Editor.tune` runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pmet_lightning.data.records import Edit
from pmet_lightning.evaluation.editable import EditableModel
from pmet_lightning.tune.bench import Bench
from pmet_lightning.tune.budget import Budget
from pmet_lightning.tune.facts import Facts, Item, choose_facts
from pmet_lightning.tune.results import write_results
from pmet_lightning.tune.space import PRESERVE_PROMPTS, STEPS
from pmet_lightning.tune.tuned import run_search

# What is searched, and what belongs to a single run; of the section 'model' and of 'spread'.
_NOT_SHARED = ("layers", "optimize", "optimizer", "clamp", "kl_factor", "norm_factor", "targets_folder", "patch")
_NOT_SHARED_WRITES = ("lam", "rule", "targets")


def tune_object(
    module: EditableModel,
    name: str,
    sections: Mapping[str, Mapping[str, Any]],
    own: Sequence[Edit] | None,
    budget: Budget,
    folder: Path,
    seed: int,
) -> dict[str, Any]:
    """Find settings for the model of a module.

    Args:
        module: The module, with its model.
        name: Name of the model.
        sections: The settings of the editor by section; those that are not searched are kept.
        own: The user's facts, if there are some.
        budget: How much the search may take.
        folder: Folder of the search and its files.
        seed: Seed of the search.

    Returns:
        Keyword arguments for an editor.
    """
    items = None if own is None else [Item(edit, (edit,)) for edit in own]
    facts = choose_facts(module.model, module.encoder, name, items, "facts", seed, module.tokens_per_batch)
    bench = Bench(module.model, module.tokenizer, name, shared_sections(sections, facts), folder / "targets")
    tuned = run_search(bench, facts, budget, folder, seed)
    write_results(tuned, folder)
    return tuned.editor_settings()


def shared_sections(sections: Mapping[str, Mapping[str, Any]], facts: Facts) -> dict[str, dict[str, Any]]:
    """The settings that all trials share: those of an editor, and texts of the facts' world where it has none."""
    model = {name: value for name, value in sections["model"].items() if name not in _NOT_SHARED}
    spread = {name: value for name, value in sections["spread"].items() if name not in _NOT_SHARED_WRITES}
    moments = sections["moments"]
    drift = facts.world.drift(moments.get("corpus"), moments.get("corpus_subset"))
    return {
        "model": {"steps": STEPS, **model},
        "data": {},
        "moments": {"corpus": facts.world.corpus, **moments},
        "spread": {"preserve_prompts": PRESERVE_PROMPTS, **spread},
        "drift": drift | dict(sections["drift"]),
    }
