"""A callback that watches what edits do to unrelated text: perplexity, and KL to the clean model.

Legend: R = rows, T = tokens, V = vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import lightning as L
import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor
from torchmetrics import MeanMetric

from pmet_lightning.corpus import corpus_texts, packed_rows
from pmet_lightning.editable import EditableModel
from pmet_lightning.language_model import label_logits
from pmet_lightning.objective import kl_divergence, target_scores
from pmet_lightning.parallel import Team
from pmet_lightning.tokens import TokenRow, by_token_budget, pad_rows

_MOST_LOGITS = 2**27


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
        self._rows: list[TokenRow] | None = None
        self._clean: Tensor | None = None

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the model as it is now; the unedited one first."""
        assert isinstance(pl_module, EditableModel)
        if self.text is None:
            return
        if self._rows is None:
            texts = corpus_texts(self.text, self.text_subset, self.seed)
            packed = itertools.islice(packed_rows(texts, pl_module.tokenizer, self.length), self.rows)
            # Every token but the first is predicted from those before it.
            rows = [TokenRow(row.ids[:-1], labels=tuple(row.ids[1:])) for row in packed if len(row.ids) > 1]
            self._rows = Team.of(trainer).own(rows)
        perplexity, kl = self._measure(pl_module, self._rows)
        pl_module.report({"perplexity": perplexity} | ({} if kl is None else {"kl": kl}))

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """As :meth:`on_validation_epoch_end`."""
        self.on_validation_epoch_end(trainer, pl_module)

    @torch.no_grad()
    def _measure(self, module: EditableModel, rows: Sequence[TokenRow]) -> tuple[float, float | None]:
        """Perplexity over all tokens, and KL at the end of each row, over the rows of all processes."""
        nll, kl = (MeanMetric().set_dtype(torch.float64).to(module.device) for _ in range(2))
        ends_RV = torch.empty(len(rows), _vocabulary(module))
        for indices in by_token_budget([len(row.ids) for row in rows], _budget(module)):
            batch = pad_rows([rows[i] for i in indices], module.encoder.pad_id).to(module.device)
            logits = label_logits(module.model, batch)
            lengths = torch.tensor([len(rows[i].labels) for i in indices], device=module.device)
            nll.update(target_scores(logits, batch.label_ids).nll.double(), weight=lengths.double())
            last = logits[torch.arange(len(indices)), lengths - 1]
            ends_RV[indices] = last.float().log_softmax(-1).cpu()
        perplexity = float(nll.compute().exp())
        if module.phase == "before":
            self._clean = ends_RV
            return perplexity, None
        if self._clean is None:
            return perplexity, None
        kl.update(kl_divergence(self._clean, ends_RV).double())
        return perplexity, float(kl.compute())


def _vocabulary(module: EditableModel) -> int:
    return int(module.model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]


def _budget(module: EditableModel) -> int:
    """Tokens of one forward pass whose logits, which are needed at all positions, take half a GiB at most."""
    return max(1, min(module.tokens_per_batch, _MOST_LOGITS // _vocabulary(module)))
