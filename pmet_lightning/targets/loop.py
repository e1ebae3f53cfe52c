"""The inner loop of the target optimisation: edits enter a flight, take their steps, and leave it one by one.

What stops is decided on the device; the host looks every few steps, lets finished edits leave, and others enter.
Legend: A = edits in flight, P = rows per edit, R = A·P, K = target tokens, V = vocabulary, F = model width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pmet_lightning.data.token_rows import PaddingSide, TokenRow, pad_rows
from pmet_lightning.model.architectures import SiteName
from pmet_lightning.model.partial_forward import Entry
from pmet_lightning.model.scoring import kl_divergence, target_scores
from pmet_lightning.targets.active_batch import DeltaSlots, Flight
from pmet_lightning.targets.batch_size import ModelSize, longest_tail
from pmet_lightning.targets.loss import norm_penalty, project_to_ball
from pmet_lightning.targets.row_cache import RowSet
from pmet_lightning.targets.store import PARTS, STOP_REASONS, Target
from pmet_lightning.utils.memory import free_memory, is_out_of_memory

log = logging.getLogger(__name__)

# METHOD.md, step 1, choice 6: once every target token is the argmax, its likelihood weighs a tenth, and the
# edit is done as soon as the subject's meaning has not drifted either.
ARGMAX_NLL_SHARE = 0.1
ARGMAX_KL_TOLERANCE = 0.01
_REASONS = ("", *STOP_REASONS)
# Edits enter when this share of the places is free: each entry costs a pass over what stands before the subjects.
_REFILL = 0.25


@dataclass(frozen=True)
class Rules:
    """What is minimised and when an edit stops.

    Attributes:
        nll: f_nll, weight of the target's negative log-likelihood.
        kl: f_kl, weight of the divergence at "{subject} is a".
        norm: f_wd, weight of the norm term.
        steps: Most iterations; the last one makes no update.
        clamp: Radius of the ball of each delta, in norms of its clean output.
        loss_tolerance: An edit whose loss is below stops.
        argmax_rule: Whether PMET's rule for targets that are the argmax holds (MEMIT has none).
        realised: Whether v* is what the model realises, or the clean output plus delta.
    """

    nll: float
    kl: float
    norm: float
    steps: int
    clamp: float
    loss_tolerance: float
    argmax_rule: bool
    realised: bool


@dataclass(frozen=True)
class Request:
    """One edit to find a target for.

    Attributes:
        rows: Bare prompt, contexts, KL prompt.
        name: What to call it in an error.
    """

    rows: list[TokenRow]
    name: str


class TargetLoop:
    """Finds the targets of any number of edits, as many of them at a time as there is room for.

    Args:
        model: The frozen language model.
        modules: The module of each optimised site at layer L.
        slots: Trainable deltas of the same sites.
        optimizer: The optimizer of their parameters.
        step: What makes its step.
        rules: The loss and the stop rules.
        entry: Layers up to and with the one above layer L. What stands before the subjects and below layer L is then
            computed once; ``None`` runs the whole model at every step, which gives the same.
        pad_id: Padding token.
        padding_side: Where rows are padded.
        look_every: Steps between two looks of the host at what has stopped; an edit that has stopped in between
            stays as it was.
        logged: Gets means over the edits in flight at every look.
        agreed: Of processes that must run the same passes, gives all of them what one has. An allocation that fails on
            one of them then ends the run.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        modules: Mapping[SiteName, nn.Module],
        slots: DeltaSlots,
        optimizer: Any,
        step: Callable[[], Any],
        rules: Rules,
        entry: Entry | None,
        pad_id: int,
        padding_side: PaddingSide,
        look_every: int,
        logged: Callable[[dict[str, float]], None],
        agreed: Callable[[list[int]], list[int]] | None = None,
    ) -> None:
        self.model, self.modules, self.slots, self.rules = model, modules, slots, rules
        self.optimizer, self.step = optimizer, step
        self.entry = entry
        self.pad_id, self.padding_side, self.look_every, self.logged = pad_id, padding_side, look_every, logged
        self.agreed, self.room = agreed, len(slots)
        self.flight: Flight | None = None
        self.aboard: list[int] = []  # in flight, or about to be
        self._steps_since_look = 0
        self._requests: Sequence[Request] = ()
        self._histories: dict[int, list[list[float]]] = {}
        first = next(iter(slots.values.values()))
        self.dtype, self.device = first.dtype, first.device

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Target]]:
        """Optimise all edits, the longest first, since what fits then always fits.

        Yields:
            The number of each edit and its target, as it is finished.

        Raises:
            FloatingPointError: If a loss is not finite; the message names the edit.
            RuntimeError: If not even one edit fits into memory.
        """
        self._requests = requests
        lengths = [longest_tail(request.rows, self.entry is None) for request in requests]
        waiting = sorted(range(len(requests)), key=lambda i: lengths[i])
        while waiting or self.flight is not None:
            short_of_memory = False
            try:
                finished = self._round(waiting)
            except RuntimeError as error:
                if not is_out_of_memory(error) or self.agreed is not None:
                    raise
                if len(self.aboard) == 1:
                    raise RuntimeError(
                        f"out of memory with a single edit ({requests[self.aboard[0]].name}); use a larger device, "
                        "--model.dtype bfloat16, or fewer and shorter contexts"
                    ) from error
                short_of_memory = True
            if short_of_memory:  # behind the handler, since the error holds on to what did not fit
                self._start_again(waiting)
            else:
                yield from finished

    def _round(self, waiting: list[int]) -> list[tuple[int, Target]]:
        """Let edits enter if there is room, take one step, and let those that have stopped leave."""
        self._admit(waiting)
        assert self.flight is not None
        flight = self.flight
        leaves = self.slots.leaves(flight.slots)
        loss = self._iterate(flight, leaves)
        self._steps_since_look += 1
        flight.ages = [age + 1 for age in flight.ages]
        stopped: list[int] = []
        if self._steps_since_look >= self.look_every or max(flight.ages) >= self.rules.steps:
            stopped = self._look(flight)
        if len(stopped) < len(flight.numbers):
            self._update(flight, leaves, loss)
        return self._leave(flight, stopped) if stopped else []

    def _admit(self, waiting: list[int]) -> None:
        free = self.room - len(self.aboard)
        if not waiting or free < max(1, min(int(_REFILL * self.room), len(waiting))) or self._steps_since_look:
            return
        entering = [waiting.pop() for _ in range(min(free, len(waiting)))]
        self.aboard += entering
        taken = set() if self.flight is None else set(self.flight.slots.tolist())
        slots = [slot for slot in range(len(self.slots)) if slot not in taken][: len(entering)]
        facts = self._row_set([self._requests[i].rows[:-1] for i in entering])
        meanings = self._row_set([self._requests[i].rows[-1:] for i in entering]) if self.rules.kl else None
        self.slots.open(slots, self.optimizer.state)
        count = len(entering)
        newcomers = Flight(
            numbers=entering,
            slots=torch.tensor(slots, device=self.device),
            ages=[0] * count,
            facts=facts,
            meanings=meanings,
            active=torch.ones(count, dtype=torch.bool, device=self.device),
            reason=torch.zeros(count, dtype=torch.long, device=self.device),
            nll_factor=torch.full((count,), self.rules.nll, dtype=self.dtype, device=self.device),
        )
        if self.flight is None:
            self.flight = newcomers
        else:
            self.flight.join(newcomers)

    def _row_set(self, rows: Sequence[Sequence[TokenRow]]) -> RowSet:
        """Rows of some edits, as many of each."""
        padded = pad_rows([row for own in rows for row in own], self.pad_id, self.padding_side).to(self.device)
        return RowSet.of(self.model, padded, len(rows[0]), self.entry)

    @torch.enable_grad()
    def _iterate(self, flight: Flight, leaves: dict[SiteName, Tensor]) -> Tensor:
        """Forward, losses and stop rules; returns the sum of the losses of the edits that go on."""
        logits_NV, at_APK, outputs = self._forward(flight.facts, leaves)
        known = flight.known
        _greet(flight, outputs)
        labels = flight.facts.rows.label_ids.unflatten(0, (len(flight.numbers), -1))
        scores = target_scores(logits_NV, labels, at_APK)
        nll, p = scores.nll.mean(dim=1), (-scores.nll).exp()
        kl = torch.zeros_like(nll)
        if flight.meanings is not None:
            meaning_NV, at_A11, _ = self._forward(flight.meanings, leaves)
            log_p = meaning_NV[at_A11[:, 0, 0]].to(nll.dtype).log_softmax(dim=-1)
            flight.clean_kl = _behind(flight.clean_kl, log_p.detach()[known:])
            kl = self.rules.kl * kl_divergence(log_p, flight.clean_kl)
        penalties = [norm_penalty(delta, flight.clean[site]) for site, delta in leaves.items()]
        norm = self.rules.norm * torch.stack(penalties).sum(dim=0)
        loss = flight.nll_factor * nll + kl + norm
        parts = dict(zip(PARTS, (loss, nll, kl, norm, p.mean(dim=1), p[:, 0]), strict=True))
        with torch.no_grad():
            for site, delta in leaves.items():
                base = outputs[site] if self.rules.realised else flight.clean[site]
                length = delta.norm(dim=-1) / flight.clean[site].norm(dim=-1)
                going_on = flight.active.unsqueeze(-1)
                flight.final[site] = torch.where(going_on, base + delta, flight.final[site])
                flight.final_norm[site] = torch.where(flight.active, length, flight.final_norm[site])
            columns = [parts[name].detach().to(self.dtype) for name in PARTS]
            flight.trail.append(torch.stack([*columns, flight.active.to(self.dtype)], dim=1))
            self._apply_stop_rules(flight, loss, kl, scores.all_argmax.all(dim=1))
        return torch.where(flight.active, loss, 0.0).sum()

    def _forward(
        self, rows: RowSet, leaves: Mapping[SiteName, Tensor]
    ) -> tuple[Tensor, Tensor, dict[SiteName, Tensor]]:
        """As :meth:`RowSet.run`, the outputs in the deltas' precision."""
        logits, at, outputs = rows.run(self.model, self.modules, leaves, self.entry)
        return logits, at, {site: output.to(leaves[site]) for site, output in outputs.items()}

    def _apply_stop_rules(self, flight: Flight, loss: Tensor, kl: Tensor, argmax: Tensor) -> None:
        settled = torch.zeros_like(argmax)
        if self.rules.argmax_rule:
            flight.nll_factor = self.rules.nll * torch.where(argmax, ARGMAX_NLL_SHARE, 1.0).to(self.dtype)
            settled = argmax & (kl <= ARGMAX_KL_TOLERANCE)
        reason = torch.where(settled, _REASONS.index("argmax"), 0)
        if max(flight.ages) + 1 >= self.rules.steps:
            over = torch.tensor([age + 1 >= self.rules.steps for age in flight.ages], device=self.device)
            reason = torch.where(over & ~settled, _REASONS.index("steps"), reason)
        reason = torch.where(loss < self.rules.loss_tolerance, _REASONS.index("loss"), reason)
        flight.reason = torch.where(flight.active, reason, flight.reason)
        flight.active = flight.active & (reason == 0)

    def _update(self, flight: Flight, leaves: Mapping[SiteName, Tensor], loss: Tensor) -> None:
        """Gradient, optimizer step and projection; the deltas that have stopped are no longer looked at."""
        self.slots.set_gradients(flight.slots, torch.autograd.grad(loss, list(leaves.values())))
        self.step()
        with torch.no_grad():
            for site, values in self.slots.values.items():
                radius = self.rules.clamp * flight.clean[site].norm(dim=-1)
                values[flight.slots] = project_to_ball(values[flight.slots], radius)

    def _look(self, flight: Flight) -> list[int]:
        """Fetch what has happened since the last look; returns the places of the edits that have stopped.

        Raises:
            FloatingPointError: If a loss is not finite.
        """
        points = torch.stack(flight.trail).cpu()
        flight.trail.clear()
        self._steps_since_look = 0
        counted = points[..., -1].bool()
        self._check_finite(flight, points[..., 0].isfinite() | ~counted)
        for place, number in enumerate(flight.numbers):
            own = self._histories.setdefault(number, [])
            own += points[counted[:, place], place, :-1].tolist()
        now = points[-1][counted[-1]]
        means = dict(zip(PARTS, now[:, :-1].mean(dim=0).tolist(), strict=True)) if len(now) else {}
        self.logged(means | {"active_edits": float(len(now))})
        stopped: list[int] = (~flight.active).nonzero().flatten().tolist()
        if self.agreed is not None:  # a rounding error may decide: then it must be the same one everywhere
            stopped = self.agreed(stopped)
            flight.active = torch.ones_like(flight.active)  # a gradient may still need the old one
            flight.active[stopped] = False
        return stopped

    def _leave(self, flight: Flight, stopped: Sequence[int]) -> list[tuple[int, Target]]:
        values = {site: value[list(stopped)].cpu() for site, value in flight.final.items()}
        norms = {site: value[list(stopped)].tolist() for site, value in flight.final_norm.items()}
        reasons = flight.reason[list(stopped)].tolist()
        finished = []
        for k, place in enumerate(stopped):
            number = flight.numbers[place]
            history = torch.tensor(self._histories.pop(number), dtype=self.dtype)
            first, last = (dict(zip(PARTS, history[i].tolist(), strict=True)) for i in (0, -1))
            record = {
                "steps": len(history),
                "stop_reason": _REASONS[reasons[k]],
                **{name: last[name] for name in PARTS[:4]},
                "p_prompt_before": first["p_prompt"],
                "p_before": first["p"],
                "p_after": last["p"],
                **{f"delta_{site}": norm[k] for site, norm in norms.items()},
            }
            finished.append((number, Target({s: v[k].clone() for s, v in values.items()}, record, history)))
        self.slots.close(flight.slots[list(stopped)].tolist())
        left = [place for place in range(len(flight.numbers)) if place not in set(stopped)]
        if left:
            flight.keep(left)
        else:
            self.flight = None
        self.aboard = [] if self.flight is None else list(flight.numbers)
        return finished

    def _start_again(self, waiting: list[int]) -> None:
        """After a lack of memory: all edits in flight begin anew, half as many at a time."""
        self.room = max(1, len(self.aboard) // 2)
        log.warning("out of memory with %d edits in flight: going on with %d", len(self.aboard), self.room)
        waiting += reversed(self.aboard)
        for number in self.aboard:
            self._histories.pop(number, None)
        self.slots.close(range(len(self.slots)))
        self.aboard, self.flight, self._steps_since_look = [], None, 0
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _check_finite(self, flight: Flight, fine_SA: Tensor) -> None:
        broken = (~fine_SA).any(dim=0).nonzero().flatten().tolist()
        if broken:
            names = "; ".join(self._requests[flight.numbers[place]].name for place in broken[:5])
            taken = len(self._histories.get(flight.numbers[broken[0]], ()))
            step = taken + int((~fine_SA[:, broken[0]]).long().argmax())
            raise FloatingPointError(
                f"the loss of {len(broken)} edit(s) is not finite at step {step}: {names}. "
                "Check the model's weights for NaN, or load it with --model.dtype float32 or bfloat16."
            )


def edits_in_flight(
    wanted: int | Literal["auto"], requests: Sequence[Request], size: ModelSize, device: torch.device
) -> int:
    """How many edits are optimised together: as many as wanted, or as fit into memory and pay.

    Args:
        wanted: ``micro_batch``.
        requests: All edits.
        size: Of the model.
        device: Where the model is.
    """
    if wanted == "auto":
        longest = max(requests, key=lambda request: size.edit_bytes(request.rows))
        wanted = size.most_edits(longest.rows, device, free_memory(device))
        log.info("up to %d edits are optimised together", wanted)
    # As many rounds as are needed, alike: a last one of a few edits takes nearly as long as a full one.
    return -(-len(requests) // -(-len(requests) // wanted))


def _greet(flight: Flight, outputs: Mapping[SiteName, Tensor]) -> None:
    """Keep what the first step of newcomers shows: their deltas are zero in it."""
    known = flight.known
    if known == len(flight.numbers):
        return
    for site, output in outputs.items():
        flight.clean[site] = _behind(flight.clean.get(site), output[known:])
        flight.final[site] = _behind(flight.final.get(site), output[known:])
        flight.final_norm[site] = _behind(flight.final_norm.get(site), torch.zeros_like(output[known:, 0]))


def _behind(known: Tensor | None, more: Tensor) -> Tensor:
    return more.clone() if known is None else torch.cat([known, more])
