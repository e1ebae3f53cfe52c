"""The facts that an :class:`~pmet_lightning.editor.editor.Editor` is given, in any of their forms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pmet_lightning.data.datamodule import EditDataModule
from pmet_lightning.data.readers import as_edits
from pmet_lightning.data.records import Edit

# One or several files or hub data sets; one or several facts, also as a table or as parallel lists.
Facts = str | Path | Sequence[str | Path] | Mapping[str, Any] | Edit | Iterable[Mapping[str, Any] | Edit] | Any


def read_facts(facts: Facts, tokenizer: Any, settings: Mapping[str, Any]) -> EditDataModule:
    """Read and check facts.

    Args:
        facts: The facts, or where they are.
        tokenizer: The model's tokenizer.
        settings: Settings of the section 'data'.

    Raises:
        RecordError: If one is invalid; the message names it.
    """
    paths = _paths_of(facts)
    if paths is not None:
        data = EditDataModule(**{**settings, "path": paths})
        data.attach(tokenizer)
    else:
        edits = as_edits(facts, zsre_target=settings["zsre_target"])
        data = EditDataModule.of(edits, tokenizer, **settings)
    data.setup("fit")
    return data


def _paths_of(facts: Facts) -> str | list[str] | None:
    """Names of files or data sets, as for --data.path; ``None`` if the facts themselves are given."""
    if isinstance(facts, (str, Path)):
        return str(facts)
    if isinstance(facts, (list, tuple)) and facts and all(isinstance(fact, (str, Path)) for fact in facts):
        return [str(path) for path in facts]
    return None
