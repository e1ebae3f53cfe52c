"""The methods and runs of a comparison."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Method:
    """One way to edit.

    Attributes:
        config: Configuration of its runs, a file or the name of a shipped one.
        options: What differs from it: dotted names and values, as on the command line.
        verb: fit, or finetune for the baseline.
    """

    config: str = "pmet.yaml"
    options: dict[str, Any] = field(default_factory=dict)
    verb: Literal["fit", "finetune"] = "fit"


@dataclass(frozen=True)
class Run:
    """One run of a comparison: ``edits`` records from ``skip`` on, in the order of ``seed``."""

    method: str
    edits: int
    seed: int
    skip: int

    @property
    def name(self) -> str:
        """Its folder."""
        words = "".join(c if c.isalnum() else "-" for c in self.method)
        return f"{words}-{self.edits}-seed{self.seed}-from{self.skip}"


def report_of(folder: Path) -> dict[str, Any]:
    """What a run's report.json holds."""
    return dict(json.loads((folder / "report.json").read_text(encoding="utf-8")))
