"""The inner loop of the target optimization, by continuous batching.

Edits enter the active batch, take their steps and leave it one by one, and waiting edits take the slots that become
free. Which edits stop is decided on the device; every few steps the host reads that back, removes the edits that have
finished and admits others.
Legend: A = active edits, P = rows per edit, R = A·P, K = target tokens, V = vocabulary, F = model width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pmet_lightning.data.token_rows import PaddingSide, TokenRow, pad_rows
from pmet_lightning.model.architectures import ProjectionId, SiteName
from pmet_lightning.model.logits import Logits
from pmet_lightning.model.partial_forward import PartialForward
from pmet_lightning.model.scoring import kl_divergence
from pmet_lightning.targets.active_batch import ActiveBatch, DeltaSlots
from pmet_lightning.targets.batch_size import ModelSize, longest_tail
from pmet_lightning.targets.equal_keys import all_of_group, mean_of_groups
from pmet_lightning.targets.loss import norm_penalty, project_to_ball
from pmet_lightning.targets.replay import replayed_values
from pmet_lightning.targets.row_cache import RowSet
from pmet_lightning.targets.store import PARTS, STOP_REASONS, Target
from pmet_lightning.utils.memory import free_memory, is_out_of_memory

log = logging.getLogger(__name__)

# docs/method.md, choice 6: once every target token is the argmax, the likelihood is weighted by a tenth, and the edit
# stops as soon as the divergence shows that the subject's meaning has not drifted either.
ARGMAX_NLL_SHARE = 0.1
ARGMAX_KL_TOLERANCE = 0.01
_REASONS = ("", *STOP_REASONS)
# Waiting edits enter when this share of the capacity is free: each time costs a pass over what precedes the subjects.
_REFILL = 0.25


@dataclass(frozen=True)
class Rules:
    """What is minimized and when an edit stops.

    Attributes:
        nll: f_nll, weight of the target's negative log-likelihood.
        kl: f_kl, weight of the divergence at "{subject} is a".
        norm: f_wd, weight of the norm term.
        steps: Maximum number of iterations; the last one makes no update.
        clamp: Radius of the ball of each delta, in norms of its clean output.
        loss_tolerance: An edit whose loss is below this stops.
        argmax_rule: Whether PMET's rule for targets that are the argmax applies (MEMIT has none).
        realized: Whether v* is what the model realizes, or the clean output plus delta.
        attention_steps: After so many steps, or when it would stop, an edit goes on without the attention's delta, from
            the FFN's output as it is then; ``None`` keeps the delta to the end.
    """

    nll: float
    kl: float
    norm: float
    steps: int
    clamp: float
    loss_tolerance: float
    argmax_rule: bool
    realized: bool
    attention_steps: int | None = None


@dataclass(frozen=True)
class Request:
    """One edit to find a target for.

    Attributes:
        rows: Bare prompt, contexts, KL prompt.
        name: What errors call the edit.
        group: Edits of one group have equal keys: they enter and stop together, and share their deltas.
    """

    rows: list[TokenRow]
    name: str
    group: int


class TargetLoop:
    """Finds the targets of any number of edits, with as many of them active at a time as there are slots.

    Args:
        model: The frozen language model.
        layer: L, the layer of the deltas.
        modules: The module of each optimized site at layer L.
        slots: Trainable deltas of the same sites.
        optimizer: The optimizer of their parameters.
        step: Takes the optimizer's step.
        rules: The loss and the stop rules.
        partial_forward: Starts passes at layer L or at the layer above it. What precedes the subjects, or lies below L,
            is then computed once; ``None`` runs the whole model at every step, which gives the same.
        pad_id: Padding token.
        padding_side: Where rows are padded.
        sync_every: Steps between two synchronizations with the host; an edit that has stopped in between stays as it
            was.
        log_means: Receives means over the active edits at every synchronization.
        later: Modules of layers above whose outputs, while the deltas are in place, are targets too, in running order.
        broadcast: Where several processes must run the same passes, gives all of them the value of the first. An
            allocation that fails on one of them then ends the run.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        layer: int,
        modules: Mapping[SiteName, nn.Module],
        slots: DeltaSlots,
        optimizer: Any,
        step: Callable[[], Any],
        rules: Rules,
        partial_forward: PartialForward | None,
        pad_id: int,
        padding_side: PaddingSide,
        sync_every: int,
        log_means: Callable[[dict[str, float]], None],
        later: Mapping[ProjectionId, nn.Module] | None = None,
        broadcast: Callable[[list[int]], list[int]] | None = None,
    ) -> None:
        self.model, self.layer, self.modules, self.slots, self.rules = model, layer, modules, slots, rules
        self.later = later or {}
        self.optimizer, self.step = optimizer, step
        self.partial_forward = partial_forward
        self.pad_id, self.padding_side, self.sync_every, self.log_means = pad_id, padding_side, sync_every, log_means
        self.broadcast, self.capacity = broadcast, len(slots)
        self.active: ActiveBatch | None = None
        self.active_ids: list[int] = []  # of the active edits, and of those that are about to be
        self._steps_since_sync = 0
        self._requests: Sequence[Request] = ()
        self._groups: dict[int, list[int]] = {}
        self._histories: dict[int, list[list[float]]] = {}
        first = next(iter(slots.values.values()))
        self.dtype, self.device = first.dtype, first.device

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Target]]:
        """Optimize all edits, the longest first: later batches then need no more memory than the first.

        Yields:
            The index of each edit in ``requests`` and its target, as soon as it is finished.

        Raises:
            FloatingPointError: If a loss is not finite; the message names the edit.
            RuntimeError: If not even one edit fits into memory.
        """
        self._requests = requests
        self._groups = {}
        for i, request in enumerate(requests):
            self._groups.setdefault(request.group, []).append(i)
        lengths = [longest_tail(request.rows, self.partial_forward is None) for request in requests]
        waiting = sorted(range(len(requests)), key=lambda i: lengths[i])
        while waiting or self.active is not None:
            short_of_memory = False
            try:
                finished = self._round(waiting)
            except RuntimeError as error:
                if not is_out_of_memory(error) or self.broadcast is not None:
                    raise
                if len(self.active_ids) == 1:
                    raise RuntimeError(
                        f"out of memory with a single edit ({requests[self.active_ids[0]].name}); use a larger device, "
                        "--model.dtype bfloat16, or fewer and shorter contexts"
                    ) from error
                short_of_memory = True
            if short_of_memory:  # after the handler: the error keeps references to what did not fit
                self._restart_smaller(waiting)
            else:
                yield from finished

    def _round(self, waiting: list[int]) -> list[tuple[int, Target]]:
        """Admit edits if there is capacity, take one step, and remove the edits that have stopped."""
        self._admit(waiting)
        assert self.active is not None
        active = self.active
        leaves = self.slots.leaves(active.slots)
        loss = self.iterate(active, leaves)
        self._steps_since_sync += 1
        active.step_counts = [steps + 1 for steps in active.step_counts]
        stopped: list[int] = []
        if self._steps_since_sync >= self.sync_every or max(active.step_counts) >= self.rules.steps:
            stopped = self._sync_to_host(active)
        if len(stopped) < len(active.edit_ids):
            self._update(active, leaves, loss)
        return self._remove_finished(active, stopped) if stopped else []

    def _admit(self, waiting: list[int]) -> None:
        free = self.capacity - len(self.active_ids)
        if not waiting or free < max(1, min(int(_REFILL * self.capacity), len(waiting))) or self._steps_since_sync:
            return
        entering = self._next_edits(waiting, free)
        if not entering:
            return
        self.active_ids += entering
        taken = set() if self.active is None else set(self.active.slots.tolist())
        slots = [slot for slot in range(len(self.slots)) if slot not in taken][: len(entering)]
        facts = self._row_set([self._requests[i].rows[:-1] for i in entering])
        meanings = self._row_set([self._requests[i].rows[-1:] for i in entering]) if self.rules.kl else None
        self.slots.open(slots, self.optimizer.state)
        count = len(entering)
        entering_batch = ActiveBatch(
            edit_ids=entering,
            slots=torch.tensor(slots, device=self.device),
            step_counts=[0] * count,
            facts=facts,
            meanings=meanings,
            running=torch.ones(count, dtype=torch.bool, device=self.device),
            reason=torch.zeros(count, dtype=torch.long, device=self.device),
            nll_factor=torch.full((count,), self.rules.nll, dtype=self.dtype, device=self.device),
            helped=torch.ones(count, dtype=torch.bool, device=self.device),
        )
        if self.active is None:
            self.active = entering_batch
        else:
            self.active.join(entering_batch)
        self._number_groups(self.active)

    def _next_edits(self, waiting: list[int], free: int) -> list[int]:
        """Take edits off those that wait, whole groups: one that is larger than the capacity enters in parts."""
        entering: list[int] = []
        while waiting and len(entering) < free:
            group = self._groups[self._requests[waiting[-1]].group]
            if len(group) == 1:
                entering.append(waiting.pop())
                continue
            left = [i for i in group if i in waiting]
            if len(left) > free - len(entering) and (entering or self.active_ids):
                break
            for i in left[:free]:
                waiting.remove(i)
                entering.append(i)
        return entering

    def _number_groups(self, active: ActiveBatch) -> None:
        """Number the groups of equal keys among the active edits, whenever others are active."""
        groups = [self._requests[i].group for i in active.edit_ids]
        numbers = {group: k for k, group in enumerate(dict.fromkeys(groups))}
        alone = len(numbers) == len(groups)
        active.groups = None if alone else torch.tensor([numbers[group] for group in groups], device=self.device)

    def _row_set(self, rows: Sequence[Sequence[TokenRow]]) -> RowSet:
        """Rows of some edits, the same number for each."""
        padded = pad_rows([row for group in rows for row in group], self.pad_id, self.padding_side).to(self.device)
        return RowSet.of(self.model, padded, len(rows[0]), self.partial_forward)

    @torch.enable_grad()
    def iterate(self, active: ActiveBatch, leaves: dict[SiteName, Tensor]) -> Tensor:
        """Forward pass, losses and stop rules; returns the sum of the losses of the edits that do not stop."""
        logits, outputs = self.forward(active.facts, leaves)
        _record_clean_outputs(active, outputs)
        scores = active.facts.target_scores(logits)
        nll, p = scores.nll.mean(dim=1), (-scores.nll).exp()
        kl = torch.zeros_like(nll)
        if active.meanings is not None:
            meanings, _ = self.forward(active.meanings, leaves)
            kl = self.rules.kl * _divergences(active, meanings, nll.dtype)
        penalties = [norm_penalty(delta, active.clean[site]) for site, delta in leaves.items()]
        norm = self.rules.norm * torch.stack(penalties).sum(dim=0)
        loss = active.nll_factor * nll + kl + norm
        parts = dict(zip(PARTS, (loss, nll, kl, norm, p.mean(dim=1), p[:, 0]), strict=True))
        with torch.no_grad():
            for site, delta in leaves.items():
                base = outputs[site] if self.rules.realized else active.clean[site]
                length = delta.norm(dim=-1) / active.clean[site].norm(dim=-1)
                running = active.running.unsqueeze(-1)
                active.final[site] = torch.where(running, base + delta, active.final[site])
                active.final_delta[site] = torch.where(running, delta, active.final_delta[site])
                active.final_norm[site] = torch.where(active.running, length, active.final_norm[site])
            columns = [parts[name].detach().to(self.dtype) for name in PARTS]
            active.step_log.append(torch.stack([*columns, active.running.to(self.dtype)], dim=1))
            self.apply_stop_rules(active, loss, kl, scores.all_argmax.all(dim=1))
        return torch.where(active.running, loss, 0.0).sum()

    def forward(self, rows: RowSet, leaves: Mapping[SiteName, Tensor]) -> tuple[Logits, dict[SiteName, Tensor]]:
        """As :meth:`RowSet.run`, with the outputs in the deltas' precision."""
        logits, outputs = rows.run(self.model, self.modules, leaves, self.partial_forward)
        return logits, {site: output.to(leaves[site]) for site, output in outputs.items()}

    def apply_stop_rules(self, active: ActiveBatch, loss: Tensor, kl: Tensor, argmax: Tensor) -> None:
        """Decide on the device which edits stop at this step, and the weight of the likelihood at the next."""
        settled = torch.zeros_like(argmax)
        if self.rules.argmax_rule:
            active.nll_factor = self.rules.nll * torch.where(argmax, ARGMAX_NLL_SHARE, 1.0).to(self.dtype)
            settled = argmax & (kl <= ARGMAX_KL_TOLERANCE)
        reason = torch.where(settled, _REASONS.index("argmax"), 0)
        if max(active.step_counts) + 1 >= self.rules.steps:
            last = torch.tensor([steps + 1 >= self.rules.steps for steps in active.step_counts], device=self.device)
            reason = torch.where(last & ~settled, _REASONS.index("steps"), reason)
        reason = torch.where(loss < self.rules.loss_tolerance, _REASONS.index("loss"), reason)
        if active.groups is not None:
            reason = torch.where(all_of_group(reason != 0, active.groups), reason, 0)
        if self.rules.attention_steps is not None:
            reason = self._hand_over(active, reason, self.rules.attention_steps)
        active.reason = torch.where(active.running, reason, active.reason)
        active.running = active.running & (reason == 0)

    def _hand_over(self, active: ActiveBatch, reason: Tensor, attention_steps: int) -> Tensor:
        """Choose the edits that lose the attention's delta at this step; those that had it until now do not stop."""
        due = torch.tensor([steps + 1 >= attention_steps for steps in active.step_counts], device=self.device)
        active.handed_over = active.helped & ((reason != 0) | due)
        reason = torch.where(active.helped, 0, reason)
        active.helped = active.helped & ~active.handed_over
        active.nll_factor = torch.where(active.handed_over, self.rules.nll, active.nll_factor)
        return reason

    def _update(self, active: ActiveBatch, leaves: Mapping[SiteName, Tensor], loss: Tensor) -> None:
        """Gradient, optimizer step and projection; the deltas of edits that have stopped are no longer read."""
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        if active.groups is not None:
            gradients = tuple(mean_of_groups(gradient, active.groups) for gradient in gradients)
        self.slots.set_gradients(active.slots, gradients)
        self.step()
        with torch.no_grad():
            if active.handed_over is not None:
                self._drop_attention(active, active.handed_over)
            for site, values in self.slots.values.items():
                radius = self.rules.clamp * active.clean[site].norm(dim=-1)
                values[active.slots] = project_to_ball(values[active.slots], radius)

    def _drop_attention(self, active: ActiveBatch, handed_over: Tensor) -> None:
        """Where the attention's delta is taken away, the FFN's becomes all that both had made of its output."""
        ffn, attn = self.slots.values["ffn"], self.slots.values["attn"]
        whole = active.final["ffn"] - active.clean["ffn"]
        ffn[active.slots] = torch.where(handed_over.unsqueeze(-1), whole, ffn[active.slots])
        attn[active.slots] = torch.where(active.helped.unsqueeze(-1), attn[active.slots], 0.0)

    def _sync_to_host(self, active: ActiveBatch) -> list[int]:
        """Read back the steps since the last synchronization; returns the indices of the edits that have stopped.

        Raises:
            FloatingPointError: If a loss is not finite.
        """
        points = torch.stack(active.step_log).cpu()
        active.step_log.clear()
        self._steps_since_sync = 0
        counted = points[..., -1].bool()
        self._check_finite(active, points[..., 0].isfinite() | ~counted)
        for index, edit_id in enumerate(active.edit_ids):
            history = self._histories.setdefault(edit_id, [])
            history += points[counted[:, index], index, :-1].tolist()
        latest = points[-1][counted[-1]]
        means = dict(zip(PARTS, latest[:, :-1].mean(dim=0).tolist(), strict=True)) if len(latest) else {}
        self.log_means(means | {"active_edits": float(len(latest))})
        stopped: list[int] = (~active.running).nonzero().flatten().tolist()
        if self.broadcast is not None:  # rounding may decide, and must then decide the same on all
            stopped = self.broadcast(stopped)
            active.running = torch.ones_like(active.running)  # new: a gradient may need the old one
            active.running[stopped] = False
        return stopped

    def _remove_finished(self, active: ActiveBatch, stopped: Sequence[int]) -> list[tuple[int, Target]]:
        values = {(site, self.layer): value[list(stopped)] for site, value in active.final.items()}
        values = {place: value.cpu() for place, value in (values | self._later_values(active, stopped)).items()}
        p_of_value = self._p_of_value(active, stopped)
        norms = {site: value[list(stopped)].tolist() for site, value in active.final_norm.items()}
        reasons = active.reason[list(stopped)].tolist()
        finished = []
        for k, index in enumerate(stopped):
            edit_id = active.edit_ids[index]
            history = torch.tensor(self._histories.pop(edit_id), dtype=self.dtype)
            first, last = (dict(zip(PARTS, history[i].tolist(), strict=True)) for i in (0, -1))
            record = {
                "steps": len(history),
                "stop_reason": _REASONS[reasons[k]],
                **{name: last[name] for name in PARTS[:4]},
                "p_prompt_before": first["p_prompt"],
                "p_before": first["p"],
                "p_after": last["p"],
                "p_prompt_deltas": last["p_prompt"],
                "p_prompt_target": last["p_prompt"] if p_of_value is None else p_of_value[k],
                **{f"delta_{site}": norm[k] for site, norm in norms.items()},
                "same_key": len(self._groups[self._requests[edit_id].group]) - 1,
            }
            finished.append((edit_id, Target({s: v[k].clone() for s, v in values.items()}, record, history)))
        self.slots.close(active.slots[list(stopped)].tolist())
        remaining = [index for index in range(len(active.edit_ids)) if index not in set(stopped)]
        if remaining:
            active.keep(remaining)
            self._number_groups(active)
        else:
            self.active = None
        self.active_ids = [] if self.active is None else list(active.edit_ids)
        return finished

    def _later_values(self, active: ActiveBatch, stopped: Sequence[int]) -> dict[ProjectionId, Tensor]:
        """Targets of the layers above, shape [stopped, F] each."""
        if not self.later:
            return {}
        return replayed_values(
            self.model,
            [self._requests[active.edit_ids[index]].rows[0] for index in stopped],
            {site: delta[list(stopped)] for site, delta in active.final_delta.items()},
            self.modules,
            self.later,
            pad_id=self.pad_id,
            padding_side=self.padding_side,
        )

    @torch.no_grad()
    def _p_of_value(self, active: ActiveBatch, stopped: Sequence[int]) -> list[float] | None:
        """P(o*) at the bare prompts with the FFN's v* alone in place, which is all that is written of two deltas."""
        if "attn" not in active.final or "ffn" not in active.final:
            return None
        index, rows = torch.tensor(list(stopped), device=self.device), copy(active.facts)
        rows.keep(index)
        shift = active.final["ffn"][index] - active.clean["ffn"][index]
        logits, _ = self.forward(rows, {"attn": torch.zeros_like(shift), "ffn": shift})
        found: list[float] = (-rows.target_scores(logits).nll[:, 0]).exp().tolist()
        return found

    def _restart_smaller(self, waiting: list[int]) -> None:
        """Out of memory: all active edits start again, half as many at a time."""
        self.capacity = max(1, len(self.active_ids) // 2)
        log.warning("out of memory with %d active edits: going on with %d", len(self.active_ids), self.capacity)
        waiting += reversed(self.active_ids)
        for edit_id in self.active_ids:
            self._histories.pop(edit_id, None)
        self.slots.close(range(len(self.slots)))
        self.active_ids, self.active, self._steps_since_sync = [], None, 0
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _check_finite(self, active: ActiveBatch, valid_SA: Tensor) -> None:
        broken = (~valid_SA).any(dim=0).nonzero().flatten().tolist()
        if broken:
            names = "; ".join(self._requests[active.edit_ids[index]].name for index in broken[:5])
            earlier = len(self._histories.get(active.edit_ids[broken[0]], ()))
            step = earlier + int((~valid_SA[:, broken[0]]).long().argmax())
            raise FloatingPointError(
                f"the loss of {len(broken)} edit(s) is not finite at step {step}: {names}. "
                "Check the model's weights for NaN, or load it with --model.dtype float32 or bfloat16."
            )


def choose_micro_batch(
    wanted: int | Literal["auto"], requests: Sequence[Request], size: ModelSize, device: torch.device
) -> int:
    """How many edits are optimized together: the number asked for, or as many as fit into memory and save time.

    Args:
        wanted: The setting ``micro_batch``.
        requests: All edits.
        size: Size of the model.
        device: Where the model is.
    """
    if wanted == "auto":
        longest = max(requests, key=lambda request: size.edit_bytes(request.rows))
        wanted = size.most_edits(longest.rows, device, free_memory(device))
        if wanted < len(requests):
            log.info("%d edits, of which up to %d are optimized together", len(requests), wanted)
    # Rounds of equal size, no more than are needed: a last one of a few edits takes nearly as long as a full one.
    return -(-len(requests) // -(-len(requests) // wanted))


def _divergences(active: ActiveBatch, meanings: Logits, dtype: torch.dtype) -> Tensor:
    """KL divergence of each edit at its KL prompt; what new edits have there is kept, to be compared with."""
    started = 0 if active.clean_kl is None else len(active.clean_kl)

    def measure(logits_nV: Tensor, first: int) -> tuple[Tensor, ...]:
        log_p_nV = logits_nV.to(dtype).log_softmax(dim=-1)
        if first + len(log_p_nV) > started:
            active.clean_kl = _append_rows(active.clean_kl, log_p_nV.detach()[max(0, started - first) :])
        assert active.clean_kl is not None
        return (kl_divergence(log_p_nV, active.clean_kl[first : first + len(log_p_nV)]),)

    return meanings.measure(measure)[0]


def _record_clean_outputs(active: ActiveBatch, outputs: Mapping[SiteName, Tensor]) -> None:
    """Keep the outputs of edits in their first step, in which their deltas are zero."""
    started = active.started
    if started == len(active.edit_ids):
        return
    for site, output in outputs.items():
        active.clean[site] = _append_rows(active.clean.get(site), output[started:])
        active.final[site] = _append_rows(active.final.get(site), output[started:])
        active.final_delta[site] = _append_rows(active.final_delta.get(site), torch.zeros_like(output[started:]))
        active.final_norm[site] = _append_rows(active.final_norm.get(site), torch.zeros_like(output[started:, 0]))


def _append_rows(rows: Tensor | None, more: Tensor) -> Tensor:
    return more.clone() if rows is None else torch.cat([rows, more])
