"""A callback that measures what edits do to unrelated text, and ends a run that damages the model.

Legend: R = rows, T = tokens, V = vocabulary.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.core.mixins import HyperparametersMixin
from torch import Tensor
from torchmetrics import MeanMetric

from pmet_lightning.data.corpus import pack_rows
from pmet_lightning.data.records import Edit
from pmet_lightning.data.token_rows import TokenRow, by_token_budget, pad_rows
from pmet_lightning.evaluation.editable import EditableModel
from pmet_lightning.evaluation.sampled_corpus import general_texts
from pmet_lightning.evaluation.verdict import DAMAGED_FROM, WARN_FROM, Damage, damage_line, damage_of
from pmet_lightning.model.forward import label_logits, most_logit_rows
from pmet_lightning.model.scoring import kl_divergence, target_scores
from pmet_lightning.utils.callbacks import find_callback, is_stream
from pmet_lightning.utils.distributed import ProcessGroup
from pmet_lightning.utils.errors import PmetError
from pmet_lightning.utils.metric_names import EDIT_BATCHES
from pmet_lightning.utils.types import PositiveFloat, PositiveInt
from pmet_lightning.write.weight_spread import WeightSpread
from pmet_lightning.write.write_report import WriteReport

log = logging.getLogger(__name__)


class DamagedModelError(PmetError):
    """The edits have damaged the model, and that was to be an error."""


class Drift(HyperparametersMixin, L.Callback):
    """Perplexity of plain text at every evaluation, and KL(clean ‖ edited) of the next token after a fit.

    The clean model's distributions are kept for one position of each row, its last. With a limit, perplexity and the
    growth of the weights are checked after each edit batch too.

    Args:
        text: A corpus as for --moments.corpus; null measures nothing.
        text_subset: Subset of a hub data set.
        rows: Number of rows of text.
        length: Tokens in a row.
        seed: Seed of the order of the texts; not that of the second moments, so that the rows differ from theirs.
        max_perplexity: Limit of the perplexity after an edit batch, relative to that before the first edit; beyond it
            the run ends.
        max_growth: Limit of the norm of a weight's total ΔW, relative to that of the weight; beyond it the run ends.
        on_limit: Whether the edit batch that exceeds a limit is kept ('stop') or taken back ('rollback').
        warn_from: Growth of the perplexity (or e^KL) from which on the verdict at the end of a run is a warning.
        damaged_from: Growth from which on the verdict is 'damaged'.
        fail_if_damaged: Whether a run with that verdict ends with an error, after its files are written: exit code 2 on
            the command line; ``Editor.edit`` takes the edits back.
    """

    def __init__(
        self,
        text: str | None = None,
        text_subset: str | None = None,
        rows: PositiveInt = 64,
        length: PositiveInt = 64,
        seed: int = 1,
        max_perplexity: PositiveFloat | None = None,
        max_growth: PositiveFloat | None = None,
        on_limit: Literal["stop", "rollback"] = "rollback",
        warn_from: PositiveFloat = WARN_FROM,
        damaged_from: PositiveFloat = DAMAGED_FROM,
        fail_if_damaged: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.warn_from, self.damaged_from, self.fail_if_damaged = warn_from, damaged_from, fail_if_damaged
        self._last_factor: float | None = None  # of the perplexity, after the last edit batch that is kept
        if max_perplexity is not None and text is None:
            raise ValueError("--drift.max_perplexity needs text to measure it on; set --drift.text")
        self.max_perplexity, self.max_growth, self.on_limit = max_perplexity, max_growth, on_limit
        self.ended = self.advice = ""  # why the run was ended, and what the user can do
        self._first_perplexity: float | None = None
        self.text, self.text_subset = text, text_subset
        self.rows, self.length, self.seed = int(rows), int(length), seed
        self._rows: list[TokenRow] | None = None
        self._clean: Tensor | None = None

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the model as it is now; the unedited one first."""
        assert isinstance(pl_module, EditableModel)
        if self.text is None:
            return
        with trainer.profiler.profile(pl_module.phase):
            perplexity, kl = self._measure(pl_module, self._own_rows(trainer, pl_module))
        if self._first_perplexity is None and pl_module.phase == "before":
            self._first_perplexity = perplexity
        pl_module.report({"perplexity": perplexity} | ({} if kl is None else {"kl": kl}))

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """As :meth:`on_validation_epoch_end`."""
        self.on_validation_epoch_end(trainer, pl_module)

    def use_before(self, earlier: Drift) -> None:
        """Compare with what a run of the same model on the same text has measured before its first edit.

        Args:
            earlier: The callback of that run, with the same text, rows, length and seed.
        """
        self._first_perplexity, self._clean = earlier._first_perplexity, earlier._clean

    @property
    def limited(self) -> bool:
        """Whether there is a limit to check after each edit batch."""
        return self.max_perplexity is not None or self.max_growth is not None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the perplexity before the first edit; prepare for a rollback if one may be needed."""
        assert isinstance(pl_module, EditableModel)
        spread = find_callback(trainer, WeightSpread)
        if spread is None:
            return
        if self.limited:
            spread.edited.keep_previous = self.on_limit == "rollback"
        needed = self.max_perplexity is not None or (is_stream(trainer) and self.text is not None)
        if needed and self._first_perplexity is None:  # no evaluation before the fit
            self._first_perplexity, _ = self._measure(pl_module, self._own_rows(trainer, pl_module))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check the limits after an edit batch; end the run if one is exceeded."""
        assert isinstance(pl_module, EditableModel)
        spread = find_callback(trainer, WeightSpread)
        if not self.limited or spread is None or "written" not in outputs:
            return
        report: WriteReport = outputs["written"]
        number, found = report.edit_batch, {"growth": max(layer.growth for layer in report.layers)}
        limits = {"growth": self.max_growth}
        if self._first_perplexity is not None:
            perplexity, _ = self._measure(pl_module, self._own_rows(trainer, pl_module))
            found["perplexity"], limits["perplexity"] = perplexity / self._first_perplexity, self.max_perplexity
        for logger in trainer.loggers:
            logger.log_metrics({f"{EDIT_BATCHES}/drift_{name}": value for name, value in found.items()}, number)
        previous, self._last_factor = self._last_factor, found.get("perplexity", self._last_factor)
        exceeded = [name for name, limit in limits.items() if limit is not None and not found[name] <= limit]
        if not exceeded:
            return
        self.ended = f"edit batch {number}: " + ", ".join(
            f"{name} {found[name]:.3g} times that of the unedited model, limit {limits[name]:g}" for name in exceeded
        )
        taken_back = self.on_limit == "rollback"
        if taken_back:
            self._last_factor = previous
            spread.edited.undo()
            del outputs["written"]
        self.advice = _advice(batch.edits, taken_back)
        log.warning("%s; the run ends here: %s", self.ended, self.advice)
        trainer.should_stop = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the model at the end of a stream, which is not evaluated there, unless its last edit batch was."""
        assert isinstance(pl_module, EditableModel)
        if is_stream(trainer) and self._first_perplexity is not None and self._last_factor is None:
            perplexity, _ = self._measure(pl_module, self._own_rows(trainer, pl_module))
            self._last_factor = perplexity / self._first_perplexity

    def damage(self, scores: Mapping[str, Mapping[str, float]]) -> Damage:
        """What all edits so far did to the text, those of earlier calls of an ``Editor`` included.

        Args:
            scores: Scores before and after, as far as there are some.
        """
        first = {} if self._first_perplexity is None else {"perplexity": self._first_perplexity}
        since_first = {**scores, "before": {**scores.get("before", {}), **first}}
        return damage_of(since_first, self.warn_from, self.damaged_from, self._last_factor)

    def check(self, damage: Damage) -> None:
        """Refuse a damaged model, if that is wanted.

        Raises:
            DamagedModelError: If the edits have damaged it.
        """
        if self.fail_if_damaged and damage.level == "damaged":
            raise DamagedModelError(f"{damage_line(damage)} (--drift.fail_if_damaged true)")

    def _own_rows(self, trainer: L.Trainer, module: EditableModel) -> list[TokenRow]:
        """This process's rows of text."""
        if self._rows is None:
            assert self.text is not None
            texts = general_texts(module, self.text, self.text_subset, self.seed)
            packed = itertools.islice(pack_rows(texts, module.tokenizer, self.length, module.encoder.rows), self.rows)
            # Every token but the first is predicted from those before it.
            rows = [TokenRow(row.ids[:-1], labels=tuple(row.ids[1:])) for row in packed if len(row.ids) > 1]
            self._rows = ProcessGroup.of(trainer).shard(rows)
        return self._rows

    @torch.no_grad()
    def _measure(self, module: EditableModel, rows: Sequence[TokenRow]) -> tuple[float, float | None]:
        """Perplexity over all tokens, and KL at the end of each row, over the rows of all processes."""
        # In this order: moving a metric to a device sets it back to float32.
        nll, kl = (MeanMetric().to(module.device).set_dtype(torch.float64) for _ in range(2))
        head_VF: Tensor = module.model.get_output_embeddings().weight  # type: ignore[operator]
        ends_RV = torch.empty(len(rows), len(head_VF), dtype=torch.promote_types(head_VF.dtype, torch.float32))
        budget = min(module.tokens_per_batch, most_logit_rows(module.model))  # logits are needed at all positions
        for indices in by_token_budget([len(row.ids) for row in rows], budget):
            batch = pad_rows([rows[i] for i in indices], module.encoder.pad_id).to(module.device)
            logits = label_logits(module.model, batch)
            lengths = torch.tensor([len(rows[i].labels) for i in indices], device=module.device)
            nll.update(target_scores(logits, batch.label_ids).nll.double(), weight=lengths.double())
            last = logits[torch.arange(len(indices)), lengths - 1]
            ends_RV[indices] = last.to(ends_RV.dtype).log_softmax(-1).cpu()
        perplexity = float(nll.compute().exp())
        if self._clean is None:
            self._clean = ends_RV if module.phase == "before" else None
            return perplexity, None
        kl.update(kl_divergence(self._clean, ends_RV).double().to(module.device))
        return perplexity, float(kl.compute())


def _advice(edits: Sequence[Edit], taken_back: bool) -> str:
    """What became of the edit batch, and what the user can do."""
    first, last = (edit.origin or repr(edit.question) for edit in (edits[0], edits[-1]))
    other = "begin another run with a larger --spread.lam or a smaller --spread.max_change"
    if not taken_back:
        return f"its edit batch was kept; a resumed run writes one more and ends again: raise the limit, or {other}"
    return (
        f"its edit batch ({first} to {last}) was taken back, and a resumed run meets it again and ends again: "
        f"take these records out of the file, raise the limit, or {other}"
    )
