"""The methods and runs of a comparison."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

# A value as YAML has it. With Any, jsonargparse would make an object of every {class_path: …}.
Setting = bool | int | float | str | list[Any] | dict[str, Any] | None


@dataclass(frozen=True)
class Method:
    """One way to edit.

    Attributes:
        config: Configuration of its runs, a file or the name of a shipped one.
        options: Settings that replace the configuration's: dotted names and values, as on the command line.
        command: ``fit``, or a baseline: ``finetune``, ``retrieve``.
    """

    config: str = "pmet.yaml"
    options: dict[str, Setting] = field(default_factory=dict)
    command: Literal["fit", "finetune", "retrieve"] = "fit"


@dataclass(frozen=True)
class Run:
    """One run of a comparison: ``edits`` records from ``skip`` on, in the order of ``seed``."""

    method: str
    edits: int
    seed: int
    skip: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        method_name = "".join(c if c.isalnum() else "-" for c in self.method)
        return f"{method_name}-{self.edits}-seed{self.seed}-from{self.skip}"

    def settings(self, method: Method, common: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """The settings that replace those of the method's configuration.

        Args:
            method: The method.
            common: Options that all runs share.
            folder: Folder of the comparison.
        """
        settings = {
            **common,
            **method.options,
            "data.limit": self.edits,
            "data.skip": self.skip,
            "data.shuffle": self.seed,
        }
        if method.command != "retrieve":  # which draws nothing
            settings["model.seed"] = self.seed
        if method.command == "fit":
            settings.setdefault("model.targets_folder", str(folder / "targets"))
        return settings


def plan_runs(methods: Mapping[str, Method], edits: Sequence[int], seeds: Sequence[int], least: int) -> Iterator[Run]:
    """All runs, alternating between methods so that a stopped comparison has some runs of each."""
    for count in edits:
        for seed in seeds:
            for part in range(max(1, -(-least // count))):
                for method in methods:
                    yield Run(method, int(count), int(seed), part * int(count))


def quiet(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The settings of a run in a folder, without loggers and progress bars."""
    return {
        **settings,
        "trainer.run_dir": str(folder),
        "trainer.logger": False,
        "trainer.enable_progress_bar": False,
    }


def read_report(folder: Path) -> dict[str, Any]:
    """The contents of a run's report.json."""
    return dict(json.loads((folder / "report.json").read_text(encoding="utf-8")))
