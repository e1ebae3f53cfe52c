"""The inner loop of the target optimisation: one iteration, the stop rules, the masked update.

Legend: B = edits of the micro-batch, A = those still active, P = rows per edit, K = target tokens,
V = vocabulary, F = model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pmet_lightning.architectures import SiteName
from pmet_lightning.language_model import label_logits
from pmet_lightning.objective import kl_divergence, norm_penalty, project_to_ball, target_scores
from pmet_lightning.prefix import Entry, Prefix, split_at_subject
from pmet_lightning.sites import record_and_add
from pmet_lightning.targets import Target
from pmet_lightning.tokens import RowBatch

# METHOD.md, step 1, choice 6: once every target token is the argmax, its likelihood weighs a tenth, and the
# edit is done as soon as the subject's meaning has not drifted either.
ARGMAX_NLL_SHARE = 0.1
ARGMAX_KL_TOLERANCE = 0.01


@dataclass(frozen=True)
class LossWeights:
    """f_nll, f_kl and f_wd of METHOD.md."""

    nll: float
    kl: float
    norm: float


class TargetLoop:
    """State of one micro-batch while its deltas are optimised.

    Args:
        model: The frozen language model.
        modules: The module of each optimised site at layer L.
        deltas: Trainable parameters of each site, shape [B, F], zero.
        rows: Rows of all edits, ``rows_per_edit`` each: bare prompt, contexts, KL prompt.
        rows_per_edit: P.
        weights: Factors of the loss.
        loss_tolerance: An edit whose loss is below stops.
        argmax_rule: Whether PMET's rule for targets that are the argmax holds (MEMIT has none).
        names: What to call each edit in an error.
        layers: The model's first layers up to and with layer L. What stands before the subjects and below layer L is
            then computed once; ``None`` runs the whole model at every step, which gives the same.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        modules: dict[SiteName, nn.Module],
        deltas: dict[SiteName, nn.Parameter],
        rows: RowBatch,
        rows_per_edit: int,
        weights: LossWeights,
        loss_tolerance: float,
        argmax_rule: bool,
        names: Sequence[str],
        layers: Sequence[nn.Module] | None = None,
    ) -> None:
        self.model, self.modules, self.deltas = model, modules, deltas
        self.rows, self.rows_per_edit = rows, rows_per_edit
        self.prefix: Prefix | None = None
        self.entry: Entry | None = None
        if layers is not None:
            self.prefix, self.rows = split_at_subject(model, rows)
            self.entry = Entry(layers)
        self.weights, self.loss_tolerance, self.argmax_rule = weights, loss_tolerance, argmax_rule
        self.names = names
        count = len(names)
        first = next(iter(deltas.values()))
        self.active = torch.ones(count, dtype=torch.bool, device=first.device)
        self.nll_factor = torch.full((count,), weights.nll, dtype=first.dtype, device=first.device)
        self.steps = [0] * count
        self.reasons = [""] * count
        self.history: list[list[dict[str, float]]] = [[] for _ in range(count)]
        self.clean: dict[SiteName, Tensor] = {}
        self.before_delta: dict[SiteName, Tensor] = {}
        self._clean_kl: Tensor | None = None
        self._loss_A: Tensor | None = None
        self._still_active = self.active  # of the edits in the rows at present

    def iterate(self, *, last: bool) -> dict[str, float]:
        """Forward, losses, stop rules; the gradient is taken by :meth:`update`.

        Args:
            last: Whether this is the last iteration, which stops every edit.

        Returns:
            Means over the active edits, for the log.

        Raises:
            FloatingPointError: If a loss is not finite.
        """
        index_A = self.active.nonzero().flatten()
        logits_APKV, outputs = self._forward(index_A)
        if not self.clean:
            self.clean = outputs
            self.before_delta = {site: value.clone() for site, value in outputs.items()}
            self._clean_kl = _last_log_probs(logits_APKV).detach()
        for site, value in outputs.items():
            self.before_delta[site][index_A] = value
        parts = self._loss_parts(logits_APKV, index_A)
        self._check_finite(parts["loss"], index_A)
        self._loss_A = parts["loss"]
        stopped = self._apply_stop_rules(parts, index_A, last)
        return self._record(parts, index_A, stopped)

    def update(self, step: Callable[[], Any], clamp: float) -> None:
        """Gradient, optimizer step and projection for the active edits; the others stay where they are."""
        assert self._loss_A is not None
        gradients = torch.autograd.grad(self._loss_A[self._still_active].sum(), list(self.deltas.values()))
        before = {site: delta.detach().clone() for site, delta in self.deltas.items()}
        for delta, gradient in zip(self.deltas.values(), gradients, strict=True):
            delta.grad = gradient
        step()
        with torch.no_grad():
            for site, delta in self.deltas.items():
                # Adam's momentum moves even a delta without gradient, so its update has to be undone.
                moved = project_to_ball(delta, clamp * self.clean[site].norm(dim=-1))
                delta.copy_(torch.where(self.active.unsqueeze(-1), moved, before[site]))
        if not bool(self._still_active.all()):
            left = self._still_active.repeat_interleave(self.rows_per_edit)
            if self.entry is not None:
                self.entry.select(left, self.rows.used_columns(left))
            if self.prefix is not None:
                self.prefix = self.prefix.select(left)
            self.rows = self.rows.select(left)

    def results(self, *, realised: bool) -> list[Target]:
        """The target of every edit: clean output plus delta, or with the output as realised beside it."""
        base = self.before_delta if realised else self.clean
        values = {site: (base[site] + delta.detach()).cpu() for site, delta in self.deltas.items()}
        norms = {
            site: (delta.detach().norm(dim=-1) / self.clean[site].norm(dim=-1)).tolist()
            for site, delta in self.deltas.items()
        }
        targets = []
        for i, history in enumerate(self.history):
            final = history[-1]
            record = {
                "steps": self.steps[i],
                "stop_reason": self.reasons[i],
                **{name: final[name] for name in ("loss", "nll", "kl", "norm")},
                "p_prompt_before": history[0]["p_prompt"],
                "p_before": history[0]["p"],
                "p_after": final["p"],
                **{f"delta_{site}": norms[site][i] for site in self.deltas},
            }
            targets.append(Target({site: value[i].clone() for site, value in values.items()}, record))
        return targets

    def _forward(self, index_A: Tensor) -> tuple[Tensor, dict[SiteName, Tensor]]:
        """Logits [A, P, K, V], and each site's output in the bare row before its delta, [A, F]."""
        with ExitStack() as stack:
            recordings = {}
            for site, module in self.modules.items():
                added = self.deltas[site][index_A].repeat_interleave(self.rows_per_edit, dim=0)
                recordings[site] = stack.enter_context(record_and_add(module, self.rows.subject, added))
            if self.entry is not None:
                stack.enter_context(self.entry())
            logits = label_logits(self.model, self.rows, self.prefix)
        bare = slice(None, None, self.rows_per_edit)
        dtype = self.nll_factor.dtype
        outputs = {site: r.take().detach()[bare].to(dtype) for site, r in recordings.items()}
        return logits.unflatten(0, (len(index_A), self.rows_per_edit)), outputs

    def _loss_parts(self, logits_APKV: Tensor, index_A: Tensor) -> dict[str, Tensor]:
        """Weighted parts of the loss and what the stop rules need, shape [A] each."""
        assert self._clean_kl is not None
        labels = self.rows.label_ids.unflatten(0, (len(index_A), self.rows_per_edit))[:, :-1]
        scores = target_scores(logits_APKV[:, :-1], labels)
        nll = scores.nll.mean(dim=1)
        kl = self.weights.kl * kl_divergence(_last_log_probs(logits_APKV), self._clean_kl[index_A])
        penalties = [norm_penalty(delta[index_A], self.clean[site][index_A]) for site, delta in self.deltas.items()]
        norm = self.weights.norm * torch.stack(penalties).sum(dim=0)
        return {
            "loss": self.nll_factor[index_A] * nll + kl + norm,
            "nll": nll,
            "kl": kl,
            "norm": norm,
            "p": (-scores.nll).exp().mean(dim=1),
            "p_prompt": (-scores.nll[:, 0]).exp(),
            "all_argmax": scores.all_argmax.all(dim=1),
        }

    def _apply_stop_rules(self, parts: dict[str, Tensor], index_A: Tensor, last: bool) -> list[str]:
        """Mark the edits that stop now; returns a reason for each active edit, empty if it goes on."""
        low = (parts["loss"] < self.loss_tolerance).tolist()
        settled = [False] * len(index_A)
        if self.argmax_rule:
            argmax = parts["all_argmax"]
            share = torch.where(argmax, ARGMAX_NLL_SHARE, 1.0).to(self.nll_factor.dtype)
            self.nll_factor[index_A] = self.weights.nll * share
            settled = (argmax & (parts["kl"] <= ARGMAX_KL_TOLERANCE)).tolist()
        reasons = [
            "loss" if is_low else "argmax" if is_settled else "steps" if last else ""
            for is_low, is_settled in zip(low, settled, strict=True)
        ]
        going_on = torch.tensor([not reason for reason in reasons], device=self.active.device)
        self._still_active = going_on
        self.active[index_A] = going_on
        return reasons

    def _record(self, parts: dict[str, Tensor], index_A: Tensor, reasons: list[str]) -> dict[str, float]:
        columns = {name: value.detach().tolist() for name, value in parts.items()}
        for position, i in enumerate(index_A.tolist()):
            self.history[i].append({name: column[position] for name, column in columns.items()})
            self.steps[i] += 1
            self.reasons[i] = reasons[position]
        means = {name: float(parts[name].detach().mean()) for name in ("loss", "nll", "kl", "norm", "p")}
        return means | {"active": float(len(index_A))}

    def _check_finite(self, loss_A: Tensor, index_A: Tensor) -> None:
        broken = index_A[~loss_A.detach().isfinite()].tolist()
        if broken:
            names = "; ".join(self.names[i] for i in broken[:5])
            raise FloatingPointError(
                f"the loss of {len(broken)} edit(s) is not finite at step {self.steps[broken[0]]}: {names}. "
                "Check the model's weights for NaN, or load it with --model.dtype float32 or bfloat16."
            )


def _last_log_probs(logits_APKV: Tensor) -> Tensor:
    """Log-probabilities at the end of each edit's last row, the KL prompt, shape [A, V]."""
    logits = logits_APKV[:, -1, 0]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
