"""Causal tracing: the subject is corrupted, and one component's clean output is restored at one layer and token.

The resulting rise of P(answer) is the component's indirect effect there (Meng et al., 2022).
Legend: P = pairs of a fact and a draw of the noise, T = tokens, F = model width, E = embedding width, X = restored
outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pmet_lightning.analysis.facts import Question
from pmet_lightning.analysis.measures import Measure
from pmet_lightning.data.token_rows import RowBatch, TokenRow, pad_rows
from pmet_lightning.model.architectures import SiteName
from pmet_lightning.model.forward import label_logits, most_logit_rows
from pmet_lightning.model.hooks import record_whole, replace_output
from pmet_lightning.model.partial_forward import start_at_layer
from pmet_lightning.model.projections import Sites

RESTORED: tuple[SiteName, ...] = ("hidden", "attn", "ffn")
POSITIONS = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first further token",
    "further tokens",
    "last token",
)
SUBJECT_LAST, LAST_TOKEN = POSITIONS[2], POSITIONS[-1]


def default_window(depth: int) -> int:
    """The window for a model of so many layers: as large a share as that of the 10 of 48 layers in Meng et al."""
    return max(1, 10 * depth // 48)


@dataclass(frozen=True)
class Tracer:
    """What a trace needs besides the facts.

    Attributes:
        model: The language model.
        sites: Its modules.
        tuples: Whether its layers return tuples.
        window: Number of layers, around the given one, whose attention or FFN outputs are restored together.
        pad_id: Padding token.
        tokens_per_batch: Maximum number of padded tokens in one forward pass.
        device: Where the model is.
    """

    model: nn.Module
    sites: Sites
    tuples: bool
    window: int
    pad_id: int
    tokens_per_batch: int
    device: torch.device

    def restored_layers(self, site: SiteName, layer: int) -> range:
        """The layers at which a site is restored; the residual stream only at one, since it includes all below."""
        width = 1 if site == "hidden" else self.window
        first = layer - (width - 1) // 2
        return range(max(0, first), min(len(self.sites.layers), first + width))


class Traced(NamedTuple):
    """The result of a trace.

    Attributes:
        effect: Rise of P(answer), by restored component, layer and position (axis ``place``); the mean over tokens and
            draws.
        clean: P(answer) with the clean subject, shape [N].
        corrupt: P(answer) with the corrupted subject, mean over draws, shape [N].
    """

    effect: Measure
    clean: Tensor
    corrupt: Tensor


class _Rows(NamedTuple):
    """A row for each pair: index of its fact, its tokens, and the noise on the subject's embeddings."""

    fact: list[int]
    batch: RowBatch
    answer_P: Tensor
    noise_PTE: Tensor


def embedding_spread(model: nn.Module, questions: Sequence[Question]) -> float:
    """Standard deviation of the embeddings of all subjects' tokens, over tokens and features."""
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    ids = torch.tensor([q.ids[position] for q in questions for position in q.subject])
    with torch.no_grad():
        return float(embedding(ids.to(next(embedding.parameters()).device)).float().std(correction=0))


def draw_noise(questions: Sequence[Question], draws: int, width: int, deviation: float, seed: int) -> list[Tensor]:
    """Noise for the subject of each fact, shape [draws, tokens of the subject, E], float32."""
    generator = torch.Generator().manual_seed(seed)
    return [deviation * torch.randn(draws, len(q.subject), width, generator=generator) for q in questions]


def position_of(question: Question, column: int) -> int:
    """The index in POSITIONS of a token; if the subject ends the prompt, its last token counts as the subject's."""
    first, last, end = question.subject[0], question.subject[-1], len(question.ids) - 1
    if column == last:
        return POSITIONS.index(SUBJECT_LAST)
    if column < last:
        return 0 if column == first else 1
    if column == end:
        return POSITIONS.index(LAST_TOKEN)
    return 3 if column == last + 1 else 4


@torch.no_grad()
def trace(
    tracer: Tracer,
    questions: Sequence[Question],
    answers: Sequence[int],
    noise: Sequence[Tensor],
    advance: Callable[[int], object] = lambda _: None,
) -> Traced:
    """Trace some facts together.

    Only the layers from the first restored one on are run: what enters them is the same for all positions.

    Args:
        tracer: The model.
        questions: The facts.
        answers: The token of each tracked answer.
        noise: As returned by :func:`draw_noise`.
        advance: Called with the number of layers that were run, summed over the facts.
    """
    depth = len(tracer.sites.layers)
    clean_rows = _rows(tracer, questions, answers, [own[:1] * 0 for own in noise])
    rows = _rows(tracer, questions, answers, noise)
    clean_P, clean = _run(tracer, clean_rows)
    corrupt_P, corrupt = _run(tracer, rows)
    sums = torch.zeros(len(questions), len(RESTORED), depth, len(POSITIONS), dtype=torch.float64)
    counts = torch.zeros_like(sums)
    points = [(p, c) for p, n in enumerate(rows.fact) for c in range(questions[n].subject[0], len(questions[n].ids))]
    cells = (
        torch.tensor([rows.fact[p] for p, _ in points]),
        torch.tensor([position_of(questions[rows.fact[p]], column) for p, column in points]),
    )
    corrupt_X = corrupt_P[[p for p, _ in points]]
    for layer in range(depth):
        p_CX = _restore_each(tracer, rows, points, layer, clean, corrupt)
        advance(len(questions) * (depth - layer))
        for i, p_X in enumerate(p_CX):
            sums[:, i, layer].index_put_(cells, p_X - corrupt_X, accumulate=True)
            counts[:, i, layer].index_put_(cells, torch.ones_like(p_X), accumulate=True)
    effect = Measure(sums / counts, {"component": RESTORED, "layer": range(depth), "place": POSITIONS})
    return Traced(effect, clean_P, corrupt_P.reshape(len(questions), -1).mean(dim=1))


def _rows(tracer: Tracer, questions: Sequence[Question], answers: Sequence[int], noise: Sequence[Tensor]) -> _Rows:
    fact = [n for n, own in enumerate(noise) for _ in own]
    batch = pad_rows([TokenRow(questions[n].ids, labels=(answers[n],)) for n in fact], tracer.pad_id)
    noise_PTE = torch.zeros(*batch.input_ids.shape, noise[0].shape[-1])
    row = iter(range(len(fact)))
    for question, own in zip(questions, noise, strict=True):
        for draw in own:
            noise_PTE[next(row), list(question.subject)] = draw
    answer_P = torch.tensor([answers[n] for n in fact])
    return _Rows(fact, batch.to(tracer.device), answer_P, noise_PTE.to(tracer.device))


@contextmanager
def _noisy(model: nn.Module, noise_PTE: Tensor) -> Iterator[None]:
    """Add noise to the embeddings."""

    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output + noise_PTE.to(output)

    handle = model.get_input_embeddings().register_forward_hook(hook)  # type: ignore[operator]
    try:
        yield
    finally:
        handle.remove()


def _probability(model: nn.Module, rows: RowBatch, answer_P: Tensor) -> Tensor:
    """P of each row's answer, shape [P], float64, on the CPU."""
    logits = label_logits(model, rows)[:, 0].float()
    p = logits.softmax(-1).gather(1, answer_P.to(logits.device).unsqueeze(1))
    return p[:, 0].double().cpu()


class _States(NamedTuple):
    """States of a forward pass: the stream entering each layer, and each site's output in each layer, [P, T, F]."""

    entering: list[Tensor]
    outputs: dict[SiteName, list[Tensor]]


def _run(tracer: Tracer, rows: _Rows) -> tuple[Tensor, _States]:
    """P(answer) of each row, and the states."""
    sites, count = tracer.sites, len(rows.fact)
    layers = range(len(sites.layers))
    with ExitStack() as stack:
        stack.enter_context(_noisy(tracer.model, rows.noise_PTE))
        entering = [stack.enter_context(record_whole(sites.layers[i], count, output=False)) for i in layers]
        outputs = {
            site: [stack.enter_context(record_whole(sites.module(site, i), count)) for i in layers] for site in RESTORED
        }
        p = _probability(tracer.model, rows.batch, rows.answer_P)
    taken = {site: [recording.take() for recording in own] for site, own in outputs.items()}
    return p, _States([recording.take() for recording in entering], taken)


def _restore_each(
    tracer: Tracer, rows: _Rows, points: Sequence[tuple[int, int]], layer: int, clean: _States, corrupt: _States
) -> Tensor:
    """P(answer) with each component restored at each point (pair and column), shape [components, X]."""
    cases = [(i, *point) for i in range(len(RESTORED)) for point in points]
    size = max(1, min(tracer.tokens_per_batch // rows.batch.input_ids.shape[1], most_logit_rows(tracer.model)))
    parts = [
        _restore_together(tracer, rows, cases[start : start + size], layer, clean, corrupt)
        for start in range(0, len(cases), size)
    ]
    return torch.cat(parts).view(len(RESTORED), -1)


def _restore_together(
    tracer: Tracer, rows: _Rows, cases: Sequence[tuple[int, int, int]], layer: int, clean: _States, corrupt: _States
) -> Tensor:
    """P(answer) of some cases (component, pair and column), a row each, shape [X]."""
    site_X, pair_X, column_X = torch.tensor(cases, device=tracer.device).unbind(1)
    batch = RowBatch(**{name: value[pair_X] for name, value in vars(rows.batch).items()})
    shape = (len(cases), rows.batch.input_ids.shape[1])
    fact_X = torch.tensor(rows.fact, device=tracer.device)[pair_X]
    present = [site for i, site in enumerate(RESTORED) if bool((site_X == i).any())]
    start = min(tracer.restored_layers(site, layer)[0] for site in present)
    with ExitStack() as stack:
        layers, entering = list(tracer.sites.layers), corrupt.entering[start][pair_X]
        stack.enter_context(start_at_layer(layers, start, entering, tracer.tuples))
        for site in present:
            own = (site_X == RESTORED.index(site)).nonzero()[:, 0]
            positions = own * shape[1] + column_X[own]
            for at in tracer.restored_layers(site, layer):
                values = clean.outputs[site][at][fact_X[own], column_X[own]]
                stack.enter_context(replace_output(tracer.sites.module(site, at), shape, positions, values))
        return _probability(tracer.model, batch, rows.answer_P[pair_X.cpu()])
