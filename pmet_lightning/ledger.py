"""One line for every edit: how its target was found, what is left of it in the weights, what the model says."""

from __future__ import annotations

import json
from typing import Any

import torch

from pmet_lightning.edits.records import Probe
from pmet_lightning.metrics import score_probes
from pmet_lightning.module import TargetOptimizer
from pmet_lightning.spread import SpreadReport
from pmet_lightning.tokens import by_token_budget, pad_rows


def ledger_lines(module: TargetOptimizer, report: SpreadReport) -> list[str]:
    """JSON lines of one edit batch, measured on the model just written."""
    asked = [[Probe("efficacy", edit.question, edit.target)] for edit in report.edits]
    scores = score_probes(module.model, module.encoder, asked, module.tokens_per_batch, module.device)
    answers = greedy_answers(module, [edit.question for edit in report.edits])
    lines = []
    for i, (edit, target) in enumerate(zip(report.edits, report.targets, strict=True)):
        line: dict[str, Any] = {
            "case_id": edit.case_id,
            "edit_batch": report.edit_batch,
            "prompt": edit.prompt,
            "subject": edit.subject,
            "target": edit.target,
            "target_true": edit.target_true,
            **target.record,
            "residual_left": report.residual_left[i],
            "p_prompt_after": scores[i][0].magnitude,
            "answer": answers[i],
        }
        lines.append(json.dumps(line, ensure_ascii=False))
    return lines


@torch.no_grad()
def greedy_answers(module: TargetOptimizer, prompts: list[str], new_tokens: int = 8) -> list[str]:
    """What the model says next, greedily, after each prompt."""
    rows = [module.encoder.encode(prompt) for prompt in prompts]
    pad_id = module.encoder.pad_id
    answers = [""] * len(rows)
    for indices in by_token_budget([len(row.ids) + new_tokens for row in rows], module.tokens_per_batch):
        batch = pad_rows([rows[i] for i in indices], pad_id, "left").to(module.device)
        output = module.model.generate(  # type: ignore[operator]
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=pad_id,
        )
        for i, ids in zip(indices, output[:, batch.input_ids.shape[1] :], strict=True):
            answers[i] = module.encoder.decode(ids.tolist())
    return answers
