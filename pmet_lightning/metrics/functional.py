"""Questions to a model and their scores: functions without state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from pmet_lightning.edits.records import Probe, ProbeKind
from pmet_lightning.language_model import label_logits
from pmet_lightning.metrics.generation import contains, greedy_texts, is_exact
from pmet_lightning.objective import target_scores
from pmet_lightning.prefix import prefix_of
from pmet_lightning.tokens import IGNORE, PromptEncoder, TokenRow, by_token_budget, pad_rows

_CPU_TOKENS = 1024  # larger batches leave a processor's caches, and pad more (benchmarks/evaluate.py)
FREE_KINDS: tuple[ProbeKind, ...] = ("efficacy", "generalisation", "portability", "multihop")


@dataclass(frozen=True)
class ProbeResult:
    """Score of one question.

    Attributes:
        kind: The metric it counts for.
        success: 1 or 0 where there is a rival, else the share of the answer's tokens that are the argmax; the best form
            of an answer counts.
        magnitude: e^-NLL(answer) - e^-NLL(rival), or e^-NLL(answer) without one.
        exact: 1 or 0: whether the first sentence of what the model says freely is the answer; ``None`` if not asked.
        contains: 1 or 0: whether the answer stands in what the model says freely.
        accuracy: 1 or 0: whether every token of a form of the answer is the argmax.
        tokens: The argmax in the place of every token of the answer.
        kept: Share of ``tokens`` that are those of the unedited model; ``None`` if that was not asked.
    """

    kind: ProbeKind
    success: float
    magnitude: float
    exact: float | None = None
    contains: float | None = None
    accuracy: float = 0.0
    tokens: tuple[int, ...] = ()
    kept: float | None = None


@dataclass(frozen=True)
class RecordResult:
    """Everything measured for one record.

    Attributes:
        position: Its place among the edits, from 0.
        probes: One result for each of its questions.
        fluency: n-gram entropy of texts about its subject; ``None`` if none were made.
        consistency: Likeness of these texts to those about entities that have o*; NaN if there are none of those.
    """

    position: int
    probes: tuple[ProbeResult, ...]
    fluency: float | None = None
    consistency: float | None = None


def compared(after: Sequence[ProbeResult], before: Sequence[ProbeResult]) -> tuple[ProbeResult, ...]:
    """Results with ``kept``, from those of the unedited model (KnowEdit's locality is that of the neighbours)."""
    pairs = zip(after, before, strict=True)
    return tuple(replace(a, kept=sum(map(int.__eq__, a.tokens, b.tokens)) / len(a.tokens)) for a, b in pairs)


def score_probes(
    model: nn.Module,
    encoder: PromptEncoder,
    probes: Sequence[Sequence[Probe]],
    tokens_per_batch: int,
    device: torch.device,
    free_tokens: int = 0,
) -> list[list[ProbeResult]]:
    """Score the questions of some records, teacher-forced and, for what was edited, in free generation.

    Args:
        model: The language model, edited or not.
        encoder: Makes the rows.
        probes: Questions of each record.
        tokens_per_batch: Most padded tokens in one forward pass.
        device: Where the model is.
        free_tokens: Most tokens of a free answer; 0 asks for none.

    Returns:
        Results in the shape of ``probes``.
    """
    flat = [probe for record in probes for probe in record]
    # Every form of every answer, then every rival, is a row of its own.
    forms = [(i, form) for i, probe in enumerate(flat) for form in probe.answers]
    rivals = [(i, probe.rival) for i, probe in enumerate(flat) if probe.rival is not None]
    rows = [encoder.encode(flat[i].prompt, target=text) for i, text in (*forms, *rivals)]
    scores = _score_rows(model, rows, encoder.pad_id, tokens_per_batch, device)
    of_forms: dict[int, list[RowScore]] = {}
    for (i, _), score in zip(forms, scores, strict=False):
        of_forms.setdefault(i, []).append(score)
    rival = {i: score.nll for (i, _), score in zip(rivals, scores[len(forms) :], strict=True)}
    scored = [_result(probe, of_forms[i], rival.get(i)) for i, probe in enumerate(flat)]
    asked = [i for i, probe in enumerate(flat) if free_tokens and probe.kind in FREE_KINDS]
    texts = greedy_texts(
        model,
        encoder,
        [flat[i].prompt for i in asked],
        tokens_per_batch=tokens_per_batch,
        device=device,
        new_tokens=free_tokens,
    )
    for i, text in zip(asked, texts, strict=True):
        exact = any(is_exact(text, answer) for answer in flat[i].answers)
        found = any(contains(text, answer) for answer in flat[i].answers)
        scored[i] = replace(scored[i], exact=float(exact), contains=float(found))
    results = iter(scored)
    return [[next(results) for _ in record] for record in probes]


@dataclass(frozen=True)
class RowScore:
    """One answer to one question: its NLL, the share of its tokens that are the argmax, and the argmax tokens."""

    nll: float
    accuracy: float
    tokens: tuple[int, ...]


def _result(probe: Probe, forms: Sequence[RowScore], rival_nll: float | None) -> ProbeResult:
    """The best form counts, for each measure by itself."""
    nll, accuracy = min(form.nll for form in forms), max(form.accuracy for form in forms)
    success = accuracy if rival_nll is None else float(nll < rival_nll)
    magnitude = math.exp(-nll) - (0.0 if rival_nll is None else math.exp(-rival_nll))
    return ProbeResult(probe.kind, success, magnitude, accuracy=float(accuracy == 1), tokens=forms[0].tokens)


@torch.no_grad()
def _score_rows(
    model: nn.Module, rows: Sequence[TokenRow], pad_id: int, budget: int, device: torch.device
) -> list[RowScore]:
    """The scores of each row's labels; what rows have in common is run once.

    A prompt, but for its last token, is run once for all answers to it. An answer's last token is predicted and not
    read, so that a new and an old object of one token make one row.
    """
    prompts: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
    for i, row in enumerate(rows):
        cut = len(row.ids) - len(row.labels)
        prompts.setdefault(tuple(row.ids[:cut]), {}).setdefault(tuple(row.ids[cut:]), []).append(i)
    heads = list(prompts)
    lengths = [len(head) + sum(map(len, prompts[head])) for head in heads]
    found: dict[int, RowScore] = {}
    for batch in by_token_budget(lengths, min(budget, _CPU_TOKENS) if device.type == "cpu" else budget):
        together = [heads[h] for h in batch]
        members = [members for head in together for members in prompts[head].values()]
        logits = _answer_logits(model, together, [list(prompts[head]) for head in together], pad_id, device)
        place = torch.tensor([place for place, some in enumerate(members) for _ in some], device=device)
        indices = [i for some in members for i in some]
        labels = pad_sequence([torch.tensor(rows[i].labels) for i in indices], batch_first=True, padding_value=IGNORE)
        scores = target_scores(logits[place], labels.to(device))
        columns = zip(indices, scores.nll.tolist(), scores.token_accuracy.tolist(), scores.argmax.tolist(), strict=True)
        for i, nll, accuracy, argmax in columns:
            found[i] = RowScore(nll, accuracy, tuple(argmax[: len(rows[i].labels)]))
    return [found[i] for i in range(len(rows))]


def _answer_logits(
    model: nn.Module,
    heads: Sequence[tuple[int, ...]],
    tails: Sequence[Sequence[tuple[int, ...]]],
    pad_id: int,
    device: torch.device,
) -> Tensor:
    """Logits at each token of each tail behind its head, shape [tails, K, V]; the heads are run once if they can be."""
    prefix = None
    if any(heads):
        prefix = prefix_of(model, pad_rows([TokenRow(list(head)) for head in heads], pad_id).to(device))
    # Logits are wanted at every token of a tail; what the labels are does not matter here.
    if prefix is None:
        whole = [TokenRow([*head, *tail], labels=tail) for head, own in zip(heads, tails, strict=True) for tail in own]
        return label_logits(model, pad_rows(whole, pad_id).to(device))
    rows = pad_rows([TokenRow(list(tail), labels=tail) for own in tails for tail in own], pad_id).to(device)
    place = torch.tensor([place for place, own in enumerate(tails) for _ in own], device=device)
    lengths = torch.tensor([len(head) for head in heads], device=device)[place]
    rows = replace(rows, position_ids=rows.position_ids + lengths.unsqueeze(1))
    return label_logits(model, rows, prefix.select(place))


def harmonic_mean(values: Tensor) -> Tensor:
    """Harmonic mean over the last dimension; 0 where any value is 0 or less."""
    positive = (values > 0).all(dim=-1)
    mean = values.shape[-1] / values.clamp_min(1e-300).reciprocal().sum(dim=-1)
    return torch.where(positive, mean, torch.zeros_like(mean))
