"""A callback that watches what edits do to unrelated text: perplexity, and KL to the clean model.

Legend: R = rows, T = tokens, V = vocabulary.
"""

from __future__ import annotations

import itertools
from typing import Any

import lightning as L
import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor

from pmet_lightning.corpus import corpus_texts, packed_rows
from pmet_lightning.editable import EditableModel
from pmet_lightning.language_model import label_logits
from pmet_lightning.objective import kl_divergence, target_scores
from pmet_lightning.tokens import TokenRow, by_token_budget, pad_rows


class Drift(L.Callback):
    """Perplexity of plain text at every evaluation, and KL(clean ‖ edited) of the next token after a fit.

    The clean model's distributions are kept for one position of each row, its last.

    Args:
        text: A corpus as for --moments.corpus; null watches nothing.
        text_subset: Subset of a hub data set.
        rows: Rows of text.
        length: Tokens of a row.
        seed: Seed of the order of the texts; another one than that of the second moments, so that the rows are others.
    """

    def __init__(
        self,
        text: str | None = None,
        text_subset: str | None = None,
        rows: PositiveInt = 64,  # type: ignore[valid-type]
        length: PositiveInt = 64,  # type: ignore[valid-type]
        seed: int = 1,
    ) -> None:
        self.text, self.text_subset = text, text_subset
        self.rows, self.length, self.seed = int(rows), int(length), seed
        self._rows: list[TokenRow] = []
        self._clean: Tensor | None = None

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the model as it is now; the unedited one first."""
        assert isinstance(pl_module, EditableModel)
        if self.text is None:
            return
        if not self._rows:
            texts = corpus_texts(self.text, self.text_subset, self.seed)
            packed = itertools.islice(packed_rows(texts, pl_module.tokenizer, self.length), self.rows)
            # Every token but the first is predicted from those before it.
            self._rows = [TokenRow(row.ids[:-1], labels=tuple(row.ids[1:])) for row in packed if len(row.ids) > 1]
        perplexity, ends = self._measure(pl_module)
        values = {"perplexity": perplexity}
        if pl_module.phase == "before":
            self._clean = ends
        elif self._clean is not None:
            values["kl"] = float(kl_divergence(self._clean, ends).mean())
        pl_module.report(values)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """As :meth:`on_validation_epoch_end`."""
        self.on_validation_epoch_end(trainer, pl_module)

    @torch.no_grad()
    def _measure(self, module: EditableModel) -> tuple[float, Tensor]:
        """Perplexity over all tokens, and log-probabilities at the end of each row, shape [R, V]."""
        total, tokens, ends = 0.0, 0, []
        for indices in by_token_budget([len(row.ids) for row in self._rows], module.tokens_per_batch):
            rows = [self._rows[i] for i in indices]
            batch: Any = pad_rows(rows, module.encoder.pad_id).to(module.device)
            logits = label_logits(module.model, batch)
            nll = target_scores(logits, batch.label_ids).nll.double().cpu()
            lengths = torch.tensor([len(row.labels) for row in rows])
            total += float((nll * lengths).sum())
            tokens += int(lengths.sum())
            last = torch.tensor([len(row.labels) - 1 for row in rows], device=logits.device)
            ends.append(logits[torch.arange(len(rows)), last].float().log_softmax(-1).cpu())
        return float(torch.tensor(total / tokens).exp()), torch.cat(ends)
