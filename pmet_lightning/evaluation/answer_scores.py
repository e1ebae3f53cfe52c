"""Prompts are run once for everything that follows them: the scores of given answers, and the generated answer.

Legend: R = rows of a batch, Q = prompts of a group, K = tokens of an answer, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from pmet_lightning.data.token_rows import IGNORE, RowBatch, TokenRow, by_token_budget, pad_rows
from pmet_lightning.evaluation.generation import greedy_ids
from pmet_lightning.evaluation.next_tokens import NextTokens
from pmet_lightning.model.forward import label_logits
from pmet_lightning.model.kv_prefix import Prefix, gather_rows
from pmet_lightning.model.prefix_passes import read_prompts
from pmet_lightning.model.scoring import target_scores

CPU_TOKENS = 1024  # larger batches exceed a CPU's caches, and pad more (benchmarks/evaluate.py)


@dataclass(frozen=True)
class RowScore:
    """One answer to one question.

    Attributes:
        nll: Its mean negative log-likelihood per token.
        accuracy: Share of its tokens that are the argmax.
        tokens: The argmax at the position of every token.
        next_tokens: The distribution after the prompt, if it was asked for.
    """

    nll: float
    accuracy: float
    tokens: tuple[int, ...]
    next_tokens: NextTokens | None = None


@dataclass(frozen=True)
class PromptGroup:
    """A prompt and everything that is asked after it.

    Attributes:
        ids: Its token ids.
        tails: Rows by the tokens that follow the prompt. An answer's last token is predicted but not read, so that a
            new and an old object of one token each share a tail, an empty one.
        free: Rows whose answer the model generates.
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
    next_tokens: Mapping[int, NextTokens | None] | None = None,
) -> tuple[dict[int, RowScore], dict[int, list[int]]]:
    """Score the labels of rows that have some, and generate answers for those that have none.

    Args:
        model: The language model.
        rows: Questions with and without labels.
        pad_id: What to pad with.
        tokens_per_batch: Maximum number of padded tokens in one forward pass, and of those whose keys and values are
            kept.
        device: Device of the model.
        new_tokens: Maximum number of tokens of a generated answer.
        next_tokens: Rows with labels whose distribution after the prompt is wanted, each with one that it will be
            compared with, or ``None``.

    Returns:
        Scores, and token ids of generated answers, by row.
    """
    limit = min(tokens_per_batch, CPU_TOKENS) if device.type == "cpu" else tokens_per_batch
    scorer = _AnswerScorer(model, rows, pad_id, limit, device, next_tokens or {})
    scores: dict[int, RowScore] = {}
    generated: dict[int, list[int]] = {}
    for group in _groups(rows, tokens_per_batch, new_tokens):
        done = scorer.run_prompts(group, scores)
        scorer.score_other_tails(group, done, scores)
        open_ended = [number for number, prompt in enumerate(group) if prompt.free]
        if open_ended:
            prompts = [TokenRow(list(group[number].ids)) for number in open_ended]
            answers = greedy_ids(model, prompts, pad_id, device, new_tokens, done.prefix(open_ended))
            generated |= {i: ids for number, ids in zip(open_ended, answers, strict=True) for i in group[number].free}
    return scores, generated


def _groups(rows: Sequence[TokenRow], budget: int, new_tokens: int) -> list[list[PromptGroup]]:
    """The rows by their prompts, in groups whose keys and values are kept at a time; the longest come first.

    Prompts with a generated answer form separate groups: a step of generation costs little more for more rows.
    """
    found: dict[tuple[int, ...], PromptGroup] = {}
    for i, row in enumerate(rows):
        cut = len(row.ids) - max(0, len(row.labels) - 1)
        ids, tail = tuple(row.ids[:cut]), tuple(row.ids[cut:])
        prompt = found.setdefault(ids, PromptGroup(ids))
        (prompt.tails.setdefault(tail, []) if row.labels else prompt.free).append(i)
    groups = []
    for prompts in ([p for p in found.values() if p.free], [p for p in found.values() if not p.free]):
        lengths = [len(p.ids) + max(sum(map(len, p.tails)), new_tokens * bool(p.free)) for p in prompts]
        for group in by_token_budget(lengths, budget):
            groups.append(sorted((prompts[i] for i in group), key=lambda p: -len(p.ids) - len(p.longest)))
    return groups


@dataclass(frozen=True)
class _PromptStates:
    """What is kept of the prompts of a group that have been run.

    Attributes:
        first_QV: Logits after each prompt, shape [Q, V].
        prefixes: Keys and values of some prompts each; ``None`` where the model has none to keep.
    """

    first_QV: Tensor
    prefixes: list[Prefix | None]

    def prefix(self, numbers: Sequence[int]) -> Prefix | None:
        """The prefix of some prompts, given in ascending order."""
        cached = [prefix for prefix in self.prefixes if prefix is not None]
        return gather_rows(cached, numbers) if len(cached) == len(self.prefixes) else None


@dataclass(frozen=True)
class _AnswerScorer:
    """Forward passes of the model, each over rows of similar length."""

    model: nn.Module
    rows: Sequence[TokenRow]
    pad_id: int
    limit: int
    device: torch.device
    next_tokens: Mapping[int, NextTokens | None]

    def run_prompts(self, group: Sequence[PromptGroup], scores: dict[int, RowScore]) -> _PromptStates:
        """Run each prompt with its longest tail, and score that."""
        keep = any(p.free or len(p.tails) > 1 for p in group)
        first, prefixes = [], []
        # The group is sorted by length, so that the batches, one after the other, hold its prompts in order.
        for batch in by_token_budget([len(p.ids) + len(p.longest) for p in group], self.limit):
            prompts = [group[number] for number in batch]
            rows = self._rows_with_tails([(p.ids, p.longest) for p in prompts])
            logits_RKV, prefix = read_prompts(self.model, rows, keep=keep)
            scores |= self._scores(logits_RKV, [p.tails.get(p.longest, []) for p in prompts])
            first.append(logits_RKV[:, 0].clone())
            prefixes.append(prefix)
        return _PromptStates(torch.cat(first), prefixes)

    def score_other_tails(self, group: Sequence[PromptGroup], done: _PromptStates, scores: dict[int, RowScore]) -> None:
        """Score the other tails."""
        remaining = [(number, tail) for number, p in enumerate(group) for tail in p.tails if tail != p.longest]
        empty = [(number, tail) for number, tail in remaining if not tail]
        if empty:
            first_QV = done.first_QV[self._index(number for number, _ in empty)]
            scores |= self._scores(first_QV.unsqueeze(1), [group[number].tails[()] for number, _ in empty])
        remaining = [(number, tail) for number, tail in remaining if tail]
        for batch in by_token_budget([len(tail) for _, tail in remaining], self.limit):
            tails = [remaining[i] for i in sorted(batch)]
            members = [group[number].tails[tail] for number, tail in tails]
            scores |= self._scores(self._logits(group, tails, done), members)

    def _logits(
        self, group: Sequence[PromptGroup], tails: Sequence[tuple[int, tuple[int, ...]]], done: _PromptStates
    ) -> Tensor:
        """Logits after prompts and at each token of a tail, shape [R, K, V]."""
        numbers = [number for number, _ in tails]
        prefix = done.prefix(numbers)
        if prefix is None:
            return label_logits(
                self.model, self._rows_with_tails([(group[number].ids, tail) for number, tail in tails])
            )
        # Logits are wanted at every token of a tail; what the labels are does not matter here.
        batch = pad_rows([TokenRow(list(tail), labels=tail) for _, tail in tails], self.pad_id).to(self.device)
        batch = replace(batch, position_ids=batch.position_ids + prefix.mask_RP.sum(dim=1, keepdim=True))
        first_RV = done.first_QV[self._index(numbers)]
        return torch.cat([first_RV.unsqueeze(1), label_logits(self.model, batch, prefix)], dim=1)

    def _rows_with_tails(self, pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> RowBatch:
        """Rows of prompts with tails; logits are wanted after the prompt and at every token of the tail."""
        rows = [TokenRow([*ids, *tail], labels=(IGNORE, *tail)) for ids, tail in pairs]
        return pad_rows(rows, self.pad_id).to(self.device)

    def _scores(self, logits_RKV: Tensor, members: Sequence[Sequence[int]]) -> dict[int, RowScore]:
        """Scores of the rows that share each tail."""
        indices = [i for rows in members for i in rows]
        if not indices:
            return {}
        labels = [torch.tensor(self.rows[i].labels) for i in indices]
        labels_RK = pad_sequence(labels, batch_first=True, padding_value=IGNORE).to(self.device)
        number = self._index(number for number, rows in enumerate(members) for _ in rows)
        scores = target_scores(logits_RKV[number, : labels_RK.shape[1]], labels_RK)
        columns = zip(indices, scores.nll.tolist(), scores.token_accuracy.tolist(), scores.argmax.tolist(), strict=True)
        found = {i: RowScore(nll, hits, tuple(ids[: len(self.rows[i].labels)])) for i, nll, hits, ids in columns}
        for i, number_of_row in zip(indices, number.tolist(), strict=True):
            if i in self.next_tokens:
                read = NextTokens.of(logits_RKV[number_of_row, 0], self.next_tokens[i])
                found[i] = replace(found[i], next_tokens=read)
        return found

    def _index(self, numbers: Iterable[int]) -> Tensor:
        return torch.tensor(list(numbers), device=self.device)
