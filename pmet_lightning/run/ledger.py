"""One line for every edit: how its target was found, what is left of it in the weights, what the model says."""

from __future__ import annotations

import json
from typing import Any

from pmet_lightning.data.records import Probe
from pmet_lightning.evaluation.generation import greedy_texts
from pmet_lightning.evaluation.probes import score_probes
from pmet_lightning.targets.target_optimizer import TargetOptimizer
from pmet_lightning.utils.distributed import Team
from pmet_lightning.write.write_report import SpreadReport


def ledger_lines(module: TargetOptimizer, report: SpreadReport) -> list[str]:
    """JSON lines of one edit batch, measured on the model just written; each process measures its own edits."""
    team, places = Team.of(module.trainer), range(len(report.edits))
    own = team.own(places)
    asked = [[Probe("efficacy", report.edits[i].question, report.edits[i].target)] for i in own]
    scores = score_probes(module.model, module.encoder, asked, module.tokens_per_batch, module.device)
    answers = greedy_texts(
        module.model,
        module.encoder,
        [report.edits[i].question for i in own],
        tokens_per_batch=module.tokens_per_batch,
        device=module.device,
    )
    solve_error = {f"{layer.site}/layer_{layer.layer}": layer.relative_error for layer in report.layers}
    lines = []
    for i, score, answer in zip(own, scores, answers, strict=True):
        edit = report.edits[i]
        line: dict[str, Any] = {
            "case_id": edit.case_id,
            "edit_batch": report.edit_batch,
            "prompt": edit.prompt,
            "subject": edit.subject,
            "target": edit.target,
            "target_true": edit.target_true,
            "relation": edit.relation,
            **report.targets[i].record,
            "solve_error": solve_error,
            "residual_left": report.residual_left[i],
            "p_prompt_after": score[0].magnitude,
            "answer": answer,
        }
        lines.append(json.dumps(line, ensure_ascii=False))
    return team.gathered_objects(lines, len(places))
