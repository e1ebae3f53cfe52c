"""A loaded model on which settings are tried one after the other, each leaving it as it was.

A trial is a ``fit`` of Lightning's Trainer with the objects of the command line, without what a trial does not need:
loading the model, a run folder, and the questions to the unedited model, which are asked once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from pmet_lightning.data.datamodule import EditDataModule
from pmet_lightning.data.records import Edit
from pmet_lightning.evaluation.editable import CleanEvaluation, EditableModel
from pmet_lightning.evaluation.probes import ProbeResult, score_probes
from pmet_lightning.model.architectures import ProjectionId, SiteName, architecture_of, written_sites
from pmet_lightning.model.fsdp import local_rows
from pmet_lightning.model.projections import Sites, in_features
from pmet_lightning.run.settings import EditObjects, make_objects
from pmet_lightning.run.timing import PhaseProfiler
from pmet_lightning.run.trainer import EDIT_RUN, device_options, ignore_expected_warnings
from pmet_lightning.tune.outcome import Outcome, join
from pmet_lightning.tune.space import Scale
from pmet_lightning.utils.console import quietly
from pmet_lightning.write.keys import KeyRows, measure_values
from pmet_lightning.write.write_report import WriteReport

Sections = Mapping[str, Mapping[str, Any]]
FEW_NEIGHBORS = 4  # questions about neighbors that a trial asks for each edit; a finalist is asked all
_NORMAL = 1.4826  # standard deviation of a normal distribution, in medians of absolute values
_MEASURED: tuple[SiteName, ...] = ("ffn", "hidden")


class Bench:
    """The model, and what all trials share.

    Args:
        model: The language model, frozen and in eval mode.
        tokenizer: Its tokenizer.
        name: Its name.
        base: Settings that all trials share, by section, as in a configuration.
        folder: Folder in which targets and contexts are kept.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, name: str, base: Sections, folder: Path) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.base = {section: dict(settings) for section, settings in base.items()}
        self.base["model"] = self.base.get("model", {}) | {"targets_folder": str(folder)}
        self.sites = Sites.of(model, architecture_of(model.config, self.base["model"].get("architecture")))  # type: ignore[arg-type]
        self.device: torch.device = model.get_input_embeddings().weight.device  # type: ignore[operator,union-attr]
        self._clean: dict[Edit, list[ProbeResult]] = {}

    @property
    def depth(self) -> int:
        """Number of layers of the model."""
        return len(self.sites.layers)

    @property
    def layers(self) -> list[int]:
        """The layers that can be edited: a hybrid may have others."""
        return self.sites.layers_with("ffn")

    def prepare(self, layers: Sequence[int], edits: Sequence[Edit]) -> Scale:
        """Collect the second moments of all layers that may be edited in one pass, sample contexts, and measure.

        Args:
            layers: The layers.
            edits: Edits at whose subjects the values are measured.
        """
        layers = sorted(layers)
        parts = self._objects({"model": {"layers": layers}})
        with self._as_it_was(layers), ignore_expected_warnings():
            self._trainer([parts.moments], max_epochs=0).fit(parts.module, train_dataloaders=[])
        rows = KeyRows.of(edits, [], parts.module.encoder, parts.module.tokens_per_batch, self.device)
        points: list[ProjectionId] = [(site, layer) for layer in layers for site in _MEASURED]
        values = measure_values(self.model, self.sites, points, rows)
        sizes = {point: entry_size(value_NF) for point, value_NF in zip(points, values, strict=True)}
        ffn, hidden = ({layer: sizes[site, layer] for layer in layers} for site in _MEASURED)
        return Scale(ffn, hidden, in_features(self.sites.module("ffn", layers[0])))

    def measure(self, settings: Sections, batches: Sequence[Sequence[Edit]], full: bool = False) -> Outcome:
        """Write edit batches, each into the model as it was, and ask their questions.

        Args:
            settings: What is tried, by section; it replaces what all trials share.
            batches: The edit batches.
            full: Whether generated answers and the effect on plain text are measured too, as at the end of a run.
        """
        with quietly():
            return join([self._measure(settings, edits, full) for edits in batches])

    def _measure(self, settings: Sections, edits: Sequence[Edit], full: bool) -> Outcome:
        parts = self._objects(settings, {} if full else {"free_tokens": 0})
        module, kept, profiler = parts.module, _KeepReport(), PhaseProfiler()
        data = EditDataModule.of(edits, self.tokenizer, **parts.data)
        if not full:
            module.use_before(CleanEvaluation(dict(enumerate(self._clean_answers(parts.module, edits)))))
        trainer = self._trainer(
            [parts.moments, parts.spread, *([parts.drift] if full else []), kept],
            profiler=profiler,
            num_sanity_val_steps=-1 if full else 0,
        )
        with self._as_it_was(module.layers), ignore_expected_warnings():
            trainer.fit(module, data)
        assert kept.report is not None
        phases = profiler.phases()
        return Outcome(
            module.record_rows["after"],
            dict(module.results["after"]),
            math.fsum(target.record["p_after"] for target in kept.report.targets) / len(edits),
            max(layer.growth for layer in kept.report.layers),
            {"targets": phases["targets"], "write": phases["spread"], "questions": phases["after"]},
            dict(module.results.get("before", {})),
        )

    def _objects(self, settings: Sections, model: Mapping[str, Any] | None = None) -> EditObjects:
        """The objects of a trial, with the loaded model."""
        names = {*self.base, *settings}
        sections = {name: {**self.base.get(name, {}), **settings.get(name, {})} for name in names}
        sections["model"] = {**sections["model"], **(model or {})}
        parts = make_objects(self.name, sections)
        parts.module.attach(self.model, self.tokenizer)
        parts.module.setup("fit")
        return parts

    def _clean_answers(self, module: EditableModel, edits: Sequence[Edit]) -> list[list[ProbeResult]]:
        """What the unedited model answers, asked once for each edit."""
        new = [edit for edit in dict.fromkeys(edits) if edit not in self._clean]
        if new:
            asked = [edit.probes for edit in new]
            unknown: list[list[ProbeResult] | None] = [None] * len(new)
            found = score_probes(self.model, module.encoder, asked, module.tokens_per_batch, self.device, clean=unknown)
            self._clean |= dict(zip(new, found, strict=True))
        return [self._clean[edit] for edit in edits]

    def _trainer(self, callbacks: Sequence[L.Callback], **options: Any) -> L.Trainer:
        quiet = {"logger": False, "enable_progress_bar": False}
        return L.Trainer(**{**EDIT_RUN, **device_options(self.device), **quiet, "callbacks": [*callbacks], **options})

    @contextmanager
    def _as_it_was(self, layers: Sequence[int]) -> Iterator[None]:
        """Afterwards the projections of some layers are what they were, bit by bit and in their own precision."""
        projections = [self.sites.module(*found) for found in self.sites.written(written_sites("attn+ffn"), layers)]
        kept = [(one, local_rows(one.weight).clone()) for one in projections]  # type: ignore[arg-type]
        try:
            yield
        finally:
            for projection, weight in kept:
                projection.to(weight.dtype).__dict__.pop("forward", None)  # of keep_float32
                local_rows(projection.weight).copy_(weight)  # type: ignore[arg-type]


class _KeepReport(L.Callback):
    """Keeps what the write reports."""

    def __init__(self) -> None:
        self.report: WriteReport | None = None

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep it."""
        self.report = outputs["written"]


def entry_size(values: Tensor) -> float:
    """The usual size of an entry: its standard deviation, as far as few dimensions do not make it.

    In some models (Gemma) a handful of dimensions make nearly all of the norm of the residual stream.

    Args:
        values: Vectors in rows.
    """
    return _NORMAL * float(values.abs().median())


def with_few_neighbors(edit: Edit, count: int = FEW_NEIGHBORS) -> Edit:
    """An edit with the first questions about its neighbors only, and without prompts of texts."""
    neighbors = [i for i, probe in enumerate(edit.probes) if probe.kind == "specificity"]
    left_out = set(neighbors[count:])
    probes = tuple(probe for i, probe in enumerate(edit.probes) if i not in left_out)
    return replace(edit, probes=probes, generation_prompts=())
