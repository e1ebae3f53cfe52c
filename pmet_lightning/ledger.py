"""One line for every edit: how its target was found, what is left of it in the weights, what the model says."""

from __future__ import annotations

import json
from typing import Any

from pmet_lightning.edits.records import Probe
from pmet_lightning.metrics import score_probes
from pmet_lightning.metrics.generation import greedy_texts
from pmet_lightning.module import TargetOptimizer
from pmet_lightning.spread import SpreadReport


def ledger_lines(module: TargetOptimizer, report: SpreadReport) -> list[str]:
    """JSON lines of one edit batch, measured on the model just written."""
    asked = [[Probe("efficacy", edit.question, edit.target)] for edit in report.edits]
    scores = score_probes(module.model, module.encoder, asked, module.tokens_per_batch, module.device)
    answers = greedy_texts(
        module.model,
        module.encoder,
        [edit.question for edit in report.edits],
        tokens_per_batch=module.tokens_per_batch,
        device=module.device,
    )
    solve_error = {f"{layer.site}/layer_{layer.layer}": layer.relative_error for layer in report.layers}
    lines = []
    for i, (edit, target) in enumerate(zip(report.edits, report.targets, strict=True)):
        line: dict[str, Any] = {
            "case_id": edit.case_id,
            "edit_batch": report.edit_batch,
            "prompt": edit.prompt,
            "subject": edit.subject,
            "target": edit.target,
            "target_true": edit.target_true,
            "relation": edit.relation,
            **target.record,
            "solve_error": solve_error,
            "residual_left": report.residual_left[i],
            "p_prompt_after": scores[i][0].magnitude,
            "answer": answers[i],
        }
        lines.append(json.dumps(line, ensure_ascii=False))
    return lines
