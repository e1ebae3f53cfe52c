"""Prompts are read once for all that is asked behind them: the score of each answer, and what the model says freely.

Legend: R = rows of a batch, Q = questions of a group, K = tokens of an answer, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from pmet_lightning.data.token_rows import IGNORE, RowBatch, TokenRow, by_token_budget, pad_rows
from pmet_lightning.evaluation.generation import greedy_ids
from pmet_lightning.model.forward import label_logits
from pmet_lightning.model.kv_prefix import Prefix, gather_rows
from pmet_lightning.model.prefix_passes import read_prompts
from pmet_lightning.model.scoring import target_scores

CPU_TOKENS = 1024  # larger batches leave a processor's caches, and pad more (benchmarks/evaluate.py)


@dataclass(frozen=True)
class RowScore:
    """One answer to one question: its NLL, the share of its tokens that are the argmax, and the argmax tokens."""

    nll: float
    accuracy: float
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class PromptGroup:
    """A prompt and all that is asked behind it.

    Attributes:
        ids: Its tokens.
        tails: Which rows go on with which tokens. An answer's last token is predicted and not read, so that a new and
            an old object of one token make one tail, an empty one.
        free: Which rows the model shall go on with by itself.
    """

    ids: tuple[int, ...]
    tails: dict[tuple[int, ...], list[int]] = field(default_factory=dict)
    free: list[int] = field(default_factory=list)

    @property
    def longest(self) -> tuple[int, ...]:
        """The longest tail."""
        return max(self.tails, key=len, default=())


@torch.no_grad()
def score_answers(
    model: nn.Module,
    rows: Sequence[TokenRow],
    pad_id: int,
    tokens_per_batch: int,
    device: torch.device,
    new_tokens: int = 0,
) -> tuple[dict[int, RowScore], dict[int, list[int]]]:
    """Score the labels of rows that have some, and let the model go on with those that have none.

    Args:
        model: The language model.
        rows: Questions with and without labels.
        pad_id: What to pad with.
        tokens_per_batch: Most padded tokens in one forward pass, and most whose keys and values are kept.
        device: Where the model is.
        new_tokens: Most tokens of a free answer.

    Returns:
        Scores and ids of free answers, by the row.
    """
    limit = min(tokens_per_batch, CPU_TOKENS) if device.type == "cpu" else tokens_per_batch
    run = _Run(model, rows, pad_id, limit, device)
    scores: dict[int, RowScore] = {}
    said: dict[int, list[int]] = {}
    for group in _groups(rows, tokens_per_batch, new_tokens):
        begun = run.begin(group, scores)
        run.score_others(group, begun, scores)
        asked = [number for number, question in enumerate(group) if question.free]
        if asked:
            prompts = [TokenRow(list(group[number].ids)) for number in asked]
            texts = greedy_ids(model, prompts, pad_id, device, new_tokens, begun.prefix(asked))
            said |= {i: ids for number, ids in zip(asked, texts, strict=True) for i in group[number].free}
    return scores, said


def _groups(rows: Sequence[TokenRow], budget: int, new_tokens: int) -> list[list[PromptGroup]]:
    """The rows by their prompts, of which a group's keys and values are kept at a time; the longest stand first.

    Prompts that the model goes on with make groups of their own: a step costs little more for more rows.
    """
    found: dict[tuple[int, ...], PromptGroup] = {}
    for i, row in enumerate(rows):
        cut = len(row.ids) - max(0, len(row.labels) - 1)
        ids, tail = tuple(row.ids[:cut]), tuple(row.ids[cut:])
        question = found.setdefault(ids, PromptGroup(ids))
        (question.tails.setdefault(tail, []) if row.labels else question.free).append(i)
    groups = []
    for some in ([q for q in found.values() if q.free], [q for q in found.values() if not q.free]):
        lengths = [len(q.ids) + max(sum(map(len, q.tails)), new_tokens * bool(q.free)) for q in some]
        for group in by_token_budget(lengths, budget):
            groups.append(sorted((some[i] for i in group), key=lambda q: -len(q.ids) - len(q.longest)))
    return groups


@dataclass(frozen=True)
class _ReadPrompts:
    """Questions of a group that have been read.

    Attributes:
        first_QV: Logits behind each.
        prefixes: Keys and values of some questions each; ``None`` where the model has none to keep.
    """

    first_QV: Tensor
    prefixes: list[Prefix | None]

    def prefix(self, numbers: Sequence[int]) -> Prefix | None:
        """What some questions are, given in ascending order."""
        known = [prefix for prefix in self.prefixes if prefix is not None]
        return gather_rows(known, numbers) if len(known) == len(self.prefixes) else None


@dataclass(frozen=True)
class _Run:
    """Passes of the model, each over rows of one length, as near as can be."""

    model: nn.Module
    rows: Sequence[TokenRow]
    pad_id: int
    limit: int
    device: torch.device

    def begin(self, group: Sequence[PromptGroup], scores: dict[int, RowScore]) -> _ReadPrompts:
        """Read each question with its longest tail, and score that."""
        more = any(q.free or len(q.tails) > 1 for q in group)
        first, prefixes = [], []
        # The group is in order of length, and so are the questions of the batches one after the other.
        for batch in by_token_budget([len(q.ids) + len(q.longest) for q in group], self.limit):
            some = [group[number] for number in batch]
            logits_RKV, prefix = read_prompts(self.model, self._behind([(q.ids, q.longest) for q in some]), keep=more)
            scores |= self._scores(logits_RKV, [q.tails.get(q.longest, []) for q in some])
            first.append(logits_RKV[:, 0].clone())
            prefixes.append(prefix)
        return _ReadPrompts(torch.cat(first), prefixes)

    def score_others(self, group: Sequence[PromptGroup], begun: _ReadPrompts, scores: dict[int, RowScore]) -> None:
        """Score the other tails."""
        others = [(number, tail) for number, q in enumerate(group) for tail in q.tails if tail != q.longest]
        empty = [(number, tail) for number, tail in others if not tail]
        if empty:
            first_QV = begun.first_QV[self._index(number for number, _ in empty)]
            scores |= self._scores(first_QV.unsqueeze(1), [group[number].tails[()] for number, _ in empty])
        others = [(number, tail) for number, tail in others if tail]
        for batch in by_token_budget([len(tail) for _, tail in others], self.limit):
            some = [others[i] for i in sorted(batch)]
            members = [group[number].tails[tail] for number, tail in some]
            scores |= self._scores(self._logits(group, some, begun), members)

    def _logits(
        self, group: Sequence[PromptGroup], tails: Sequence[tuple[int, tuple[int, ...]]], begun: _ReadPrompts
    ) -> Tensor:
        """Logits behind questions and at each token of a tail, shape [R, K, V]."""
        numbers = [number for number, _ in tails]
        prefix = begun.prefix(numbers)
        if prefix is None:
            return label_logits(self.model, self._behind([(group[number].ids, tail) for number, tail in tails]))
        # Logits are wanted at every token of a tail; what the labels are does not matter here.
        batch = pad_rows([TokenRow(list(tail), labels=tail) for _, tail in tails], self.pad_id).to(self.device)
        batch = replace(batch, position_ids=batch.position_ids + prefix.mask_RP.sum(dim=1, keepdim=True))
        first_RV = begun.first_QV[self._index(numbers)]
        return torch.cat([first_RV.unsqueeze(1), label_logits(self.model, batch, prefix)], dim=1)

    def _behind(self, pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> RowBatch:
        """Rows of questions with tails; logits are wanted behind the question and at every token of the tail."""
        rows = [TokenRow([*ids, *tail], labels=(IGNORE, *tail)) for ids, tail in pairs]
        return pad_rows(rows, self.pad_id).to(self.device)

    def _scores(self, logits_RKV: Tensor, members: Sequence[Sequence[int]]) -> dict[int, RowScore]:
        """Scores of the rows that go on with each tail."""
        indices = [i for some in members for i in some]
        if not indices:
            return {}
        labels = [torch.tensor(self.rows[i].labels) for i in indices]
        labels_RK = pad_sequence(labels, batch_first=True, padding_value=IGNORE).to(self.device)
        number = self._index(number for number, some in enumerate(members) for _ in some)
        scores = target_scores(logits_RKV[number, : labels_RK.shape[1]], labels_RK)
        columns = zip(indices, scores.nll.tolist(), scores.token_accuracy.tolist(), scores.argmax.tolist(), strict=True)
        return {i: RowScore(nll, hits, tuple(ids[: len(self.rows[i].labels)])) for i, nll, hits, ids in columns}

    def _index(self, numbers: Iterable[int]) -> Tensor:
        return torch.tensor(list(numbers), device=self.device)
