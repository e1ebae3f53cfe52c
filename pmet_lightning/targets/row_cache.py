"""Rows of the active edits, and cached states of what need not be run at every step.

Legend: A = active edits, P = rows of an edit, R = A·P, S = tokens run, K = target tokens, V = vocabulary, F = width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from pmet_lightning.data.token_rows import IGNORE, RowBatch
from pmet_lightning.model.architectures import SiteName
from pmet_lightning.model.forward import label_logits, most_logit_rows
from pmet_lightning.model.hooks import record_and_add
from pmet_lightning.model.kv_prefix import Prefix, concatenate_prefixes
from pmet_lightning.model.logits import Logits
from pmet_lightning.model.partial_forward import PartialForward, Replay
from pmet_lightning.model.prefix_passes import split_at_subject
from pmet_lightning.model.scoring import TargetScores, label_scores, scores_of_targets


@dataclass
class RowSet:
    """Rows of some edits, the same number for each, and cached states of what need not be run at every step.

    What precedes the subjects, or lies below layer L, is never run again. In layer L itself only the subjects' last
    tokens are, since no delta reaches the others there.

    Attributes:
        rows: What is run: from the subject's last token on, or whole rows.
        per_edit: P.
        prefix: What precedes the rows; ``None`` where the whole model runs whole rows.
        entering: Hidden states that enter layer L at the subject's last token, shape [R, 1, F], if they are cached.
        leaving: Hidden states that leave layer L without deltas, shape [R, S, F], if they are cached.
        kept: Outputs of modules of the layer above where no delta reaches them, shape [R, S, their F] each.
    """

    rows: RowBatch
    per_edit: int
    prefix: Prefix | None = None
    entering: Tensor | None = None
    leaving: Tensor | None = None
    kept: dict[nn.Module, Tensor] = field(default_factory=dict)
    _positions: _Positions | None = field(default=None, init=False)
    _target_layer: Replay | None = field(default=None, init=False)
    _above: Replay | None = field(default=None, init=False)

    @classmethod
    def of(cls, model: nn.Module, rows: RowBatch, per_edit: int, partial_forward: PartialForward | None) -> RowSet:
        """Prepare some rows, ``per_edit`` for each edit.

        Args:
            model: The language model.
            rows: Whole rows, padded on either side.
            per_edit: P.
            partial_forward: Starts passes at layer L or at the one above it; ``None`` runs everything at every step.
        """
        if partial_forward is None:
            return cls(rows, per_edit)
        prefix, rows = split_at_subject(model, rows, per_edit)
        if prefix is None:
            return cls(rows, per_edit)
        below, leaving = partial_forward.entering_states(model, rows, prefix)
        return cls(
            rows,
            per_edit,
            prefix,
            below[:, :1],
            leaving,
            partial_forward.unaffected_outputs(model, rows, prefix, leaving),
        )

    @property
    def labels(self) -> Tensor:
        """Labels of every row, shape [A, P, K]."""
        return self.rows.label_ids.unflatten(0, (-1, self.per_edit))

    def join(self, other: RowSet) -> None:
        """Append the rows of other edits."""
        self._positions = self._target_layer = self._above = None
        self.rows = self.rows.join(other.rows)
        if self.prefix is not None and other.prefix is not None:
            self.prefix = concatenate_prefixes([self.prefix, other.prefix])
        if self.entering is not None and other.entering is not None:
            self.entering = torch.cat([self.entering, other.entering])
        width = self.rows.input_ids.shape[1]
        if self.leaving is not None and other.leaving is not None:
            self.leaving = _concatenate((self.leaving, other.leaving), width)
        self.kept = {m: _concatenate((kept, other.kept[m]), width) for m, kept in self.kept.items() if m in other.kept}

    def keep(self, indices: Tensor) -> None:
        """Drop the rows of all edits but those at these indices."""
        self._positions = self._target_layer = self._above = None
        count = torch.arange(self.per_edit, device=indices.device)
        rows = (indices.unsqueeze(1) * self.per_edit + count).flatten()
        if self.prefix is not None:
            self.prefix = self.prefix.select(rows)
        if self.entering is not None:
            self.entering = self.entering[rows]
        used = self.rows.used_columns(rows)
        if self.leaving is not None:
            self.leaving = self.leaving[rows][:, used]
        # The layer above may be on another device.
        self.kept = {module: outputs[rows.to(outputs.device)][:, used] for module, outputs in self.kept.items()}
        self.rows = self.rows.select(rows)

    def run(
        self,
        model: nn.Module,
        modules: Mapping[SiteName, nn.Module],
        leaves: Mapping[SiteName, Tensor],
        partial_forward: PartialForward | None,
    ) -> tuple[Logits, dict[SiteName, Tensor]]:
        """Run the rows with the deltas added.

        Returns:
            The logits wherever a label is predicted; and each site's output in the first row of an edit before its
            delta is added, [A, F].
        """
        partial_forward = None if self.prefix is None else partial_forward
        first = self.rows if partial_forward is None else self.rows.first_columns(1)
        with ExitStack() as stack:
            recordings = {}
            for site, module in modules.items():
                added = leaves[site].repeat_interleave(self.per_edit, dim=0)
                recordings[site] = stack.enter_context(record_and_add(module, first.subject, added))
            if partial_forward is None:
                logits = Logits(label_logits(model, self.rows, positions=self._positions_of_labels().labeled))
            else:
                hidden = self._run_target_layer(model, first, partial_forward)
        if partial_forward is not None:
            logits = self._run_above(model, hidden, partial_forward)
        outputs = {site: recording.take().detach()[:: self.per_edit] for site, recording in recordings.items()}
        return logits, outputs

    def target_scores(self, logits: Logits) -> TargetScores:
        """Scores of the labels of every row, shape [A, P], from the logits of :meth:`run`."""
        places = self._positions_of_labels()

        def measure(logits_nV: Tensor, first: int) -> tuple[Tensor, ...]:
            return label_scores(logits_nV, places.labels[first : first + len(logits_nV)])

        log_p_N, argmax_N = logits.measure(measure)
        at = places.at.unflatten(0, (-1, self.per_edit))
        return scores_of_targets(log_p_N[at], argmax_N[at], self.labels)

    def _positions_of_labels(self) -> _Positions:
        if self._positions is None:
            self._positions = _Positions.of(self.rows)
        return self._positions

    def _run_target_layer(self, model: nn.Module, first: RowBatch, partial_forward: PartialForward) -> Tensor:
        """Hidden states that leave layer L, which is run at the subjects' last tokens only, shape [R, S, F]."""
        assert self.entering is not None
        assert self.leaving is not None
        assert self.prefix is not None
        if self._target_layer is None:
            self._target_layer = Replay([partial_forward.below[-1]], self.prefix)
        at_subject = partial_forward.run_layers(model, first, self._target_layer, self.entering)[:, 0]
        return torch.cat([at_subject.unsqueeze(1).to(self.leaving), self.leaving[:, 1:]], dim=1)

    def _run_above(self, model: nn.Module, hidden_RSF: Tensor, partial_forward: PartialForward) -> Logits:
        """The logits wherever a label is predicted, from the hidden states that enter the layer above L."""
        assert self.prefix is not None
        places = self._positions_of_labels()
        with partial_forward.only_tokens(self.rows, places.real, places.labeled, self.kept):
            if not partial_forward.direct:
                with partial_forward.start_from(hidden_RSF, partial_forward.layer):
                    return Logits(label_logits(model, self.rows, self.prefix, places.labeled))
            if self._above is None:
                self._above = Replay([partial_forward.layer, *partial_forward.above], self.prefix)
            hidden_RSF = partial_forward.run_layers(model, self.rows, self._above, hidden_RSF)
        hidden_NF = hidden_RSF.flatten(0, 1).index_select(0, places.labeled.to(hidden_RSF.device))
        hidden_NF = hidden_NF.to(places.labels.device)  # from the last of several devices
        return Logits(hidden_NF, partial(partial_forward.logits, model), most_logit_rows(model))


@dataclass(frozen=True)
class _Positions:
    """Where in some rows what is: positions are counted over all rows.

    Attributes:
        real: Positions of real tokens.
        labeled: Positions of the N tokens that predict labels.
        labels: The labels that they predict, shape [N].
        at: For each label of each row, the index of the token that predicts it among these, shape [R, K].
    """

    real: Tensor
    labeled: Tensor
    labels: Tensor
    at: Tensor

    @classmethod
    def of(cls, rows: RowBatch) -> _Positions:
        """Find them."""
        # After the end of a shorter target the position of its last label is repeated; it is kept once.
        labeled, at = rows.label_positions().unique(return_inverse=True)
        labels = torch.full_like(labeled, IGNORE)  # below every label
        labels = labels.scatter_reduce(0, at.flatten(), rows.label_ids.flatten(), "amax")
        return cls(rows.real_positions(), labeled, labels, at)


def _concatenate(parts: Sequence[Tensor], width: int) -> Tensor:
    """The rows of several tensors of shape [R, S, F], padded to S = width."""
    return torch.cat([nn.functional.pad(part, (0, 0, 0, width - part.shape[1])) for part in parts])
