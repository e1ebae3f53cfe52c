"""A model, its facts, and everything that is measured on them before and after an edit."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pmet_lightning.analysis.components import component_measures
from pmet_lightning.analysis.facts import KnownFact, Question, ask, followed, is_said, next_token, with_own_answers
from pmet_lightning.analysis.layer_choice import Proposal, propose
from pmet_lightning.analysis.lens import Lens
from pmet_lightning.analysis.measures import Measure, concatenate_measures
from pmet_lightning.analysis.streams import is_parallel
from pmet_lightning.analysis.tracing import SUBJECT_LAST, Tracer, default_window, draw_noise, embedding_spread, trace
from pmet_lightning.data.encoder import PromptEncoder
from pmet_lightning.data.token_rows import TokenRow, by_token_budget, pad_rows
from pmet_lightning.model.projections import Sites
from pmet_lightning.utils.log_progress import progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scope:
    """How much is measured.

    Attributes:
        top: Number of highest logits in the vocabulary projections that are compared.
        least: Smallest probability that an answer must have as the model's first choice.
        noise: Noise on the subject's embeddings, in standard deviations of all subjects' embeddings.
        draws: Draws of the noise for each fact; 0 skips causal tracing.
        seed: Seed of the noise.
        window: Layers restored together; ``None`` depends on the model's depth.
        tokens_per_batch: Maximum number of padded tokens in one forward pass.
    """

    top: int
    least: float
    noise: float
    draws: int
    seed: int
    window: int | None
    tokens_per_batch: int


@dataclass(frozen=True)
class Findings:
    """What was measured in one phase.

    Attributes:
        phase: ``before`` or ``after`` an edit.
        questions: The facts, in the order of the measures.
        answers: The name of the tracked answer of each.
        measures: By name; ``effect`` is that of causal tracing.
        p: P of the true answer, the new answer, and the tracked answer with the subject corrupted, shape [N, 3].
        window: Layers whose attention or FFN outputs were restored together.
    """

    phase: str
    questions: list[Question]
    answers: list[str]
    measures: dict[str, Measure]
    p: Tensor
    window: int = 1

    def of(self, facts: Sequence[int]) -> Findings:
        """The findings on some of the facts, by their indices."""
        return replace(
            self,
            questions=[self.questions[i] for i in facts],
            answers=[self.answers[i] for i in facts],
            measures={name: measure.of(facts) for name, measure in self.measures.items()},
            p=self.p[list(facts)],
        )

    def of_followed(self, name: str, **labels: Any) -> Tensor:
        """A measure at some labels, for the tracked answer of each fact."""
        by_answer = {answer: self.measures[name].at(answer=answer, **labels) for answer in self.answers}
        return torch.stack([by_answer[answer][i] for i, answer in enumerate(self.answers)])

    def proposal(self) -> Proposal | None:
        """The layers to edit; ``None`` without causal tracing."""
        if "effect" not in self.measures:
            return None
        effect = self.measures["effect"]
        return propose(*(effect.at(component=component, place=SUBJECT_LAST) for component in ("ffn", "hidden")))


@dataclass
class Study:
    """Asks a model for facts, and measures those that it states.

    Attributes:
        model: The language model; it may be edited between two calls of :meth:`measure`.
        sites: Its modules.
        encoder: Encodes the prompts.
        scope: How much is measured.
        left_out: Facts that were left out, by reason.
        window: Layers restored together.
    """

    model: nn.Module
    sites: Sites
    encoder: PromptEncoder
    scope: Scope
    left_out: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.device = next(self.model.parameters()).device
        self.lens = Lens(self.model, self.sites, self.device)
        row = pad_rows([TokenRow([0, 0], 1)], 0).to(self.device)
        self.parallel = is_parallel(self.model, self.sites, row)
        self.window = self.scope.window or default_window(len(self.sites.layers))
        self._asked: list[Question] = []
        self._noise: list[Tensor] = []

    def ask(self, facts: Sequence[KnownFact]) -> None:
        """Encode the facts, and draw the noise that they are traced with in every phase."""
        asked, self.left_out = ask(facts, self.encoder)
        predictions = next_token(self.model, asked, self.encoder.pad_id, self.scope.tokens_per_batch)
        self._asked = with_own_answers(asked, predictions)
        if self.scope.draws and asked:
            width = self.model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
            deviation = self.scope.noise * embedding_spread(self.model, asked)
            self._noise = draw_noise(asked, self.scope.draws, width, deviation, self.scope.seed)

    def measure(self, phase: str, among: Sequence[int] | None = None) -> tuple[Findings | None, list[int]]:
        """Measure the facts whose tracked answer the model states.

        Args:
            phase: ``before`` or ``after`` an edit; decides which answer is tracked.
            among: Indices of the facts that may be used; ``None`` uses all.

        Returns:
            The findings, ``None`` if there is no such fact; and the indices of the facts.
        """
        edited = phase == "after"
        predictions = next_token(self.model, self._asked, self.encoder.pad_id, self.scope.tokens_per_batch)
        stated = is_said(self._asked, predictions, edited, self.scope.least)
        candidates = range(len(self._asked)) if among is None else among
        kept = [i for i in candidates if stated[i]]
        if len(kept) < len(candidates):
            reason = f"{phase}: the answer is not the first choice, or P is below {self.scope.least:g}"
            self.left_out[reason] += len(candidates) - len(kept)
        if not kept:
            return None, []
        questions = [self._asked[i] for i in kept]
        answers = [followed(question, edited) for question in questions]
        measures = self._components(questions, phase)
        p = torch.cat([predictions[kept, 2:], torch.full((len(kept), 1), torch.nan, dtype=torch.float64)], dim=1)
        if self.scope.draws:
            measures["effect"], p[:, 2] = self._trace(questions, answers, [self._noise[i] for i in kept], phase)
        return Findings(phase, questions, answers, measures, p, self.window), kept

    def _components(self, questions: Sequence[Question], phase: str) -> dict[str, Measure]:
        found: dict[str, list[Measure]] = {}
        order: list[int] = []
        with progress(len(questions), f"Components {phase}") as bar:
            for part in self._batches(questions, 1):
                some = [questions[i] for i in part]
                measured = component_measures(
                    self.model, self.sites, self.lens, some, self.parallel, self.encoder.pad_id, self.scope.top
                )
                order += part
                for name, measure in measured.items():
                    found.setdefault(name, []).append(measure)
                bar.update(len(part))
        return {name: _in_order(concatenate_measures(parts), order) for name, parts in found.items()}

    def _trace(
        self, questions: Sequence[Question], answers: Sequence[str], noise: Sequence[Tensor], phase: str
    ) -> tuple[Measure, Tensor]:
        tracer = Tracer(
            self.model,
            self.sites,
            self.lens.tuples,
            self.window,
            self.encoder.pad_id,
            self.scope.tokens_per_batch,
            self.device,
        )
        parts, order, corrupt = [], [], torch.zeros(len(questions), dtype=torch.float64)
        depth = len(self.sites.layers)
        with progress(len(questions) * depth * (depth + 1) // 2, f"Tracing {phase}") as bar:
            for part in self._batches(questions, self.scope.draws):
                tokens = [questions[i].answers[answers[i]] for i in part]
                traced = trace(tracer, [questions[i] for i in part], tokens, [noise[i] for i in part], bar.update)
                parts.append(traced.effect)
                corrupt[part] = traced.corrupt
                order += part
        return _in_order(concatenate_measures(parts), order), corrupt

    def _batches(self, questions: Sequence[Question], rows: int) -> list[list[int]]:
        """Batches of indices of questions whose states in all layers are held at the same time."""
        budget = max(1, self.scope.tokens_per_batch // len(self.sites.layers))
        return by_token_budget([rows * len(q.ids) for q in questions], budget)


def _in_order(measure: Measure, order: Sequence[int]) -> Measure:
    """Reorder a measure whose i-th fact is number ``order[i]``."""
    values = torch.empty_like(measure.values)
    values[list(order)] = measure.values
    return replace(measure, values=values)
