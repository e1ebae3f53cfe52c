"""The output of an analysis: JSON, CSV, and lines of text."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pmet_lightning.analysis.claims import Claim, conclusion
from pmet_lightning.analysis.components import ANSWERS, COMPONENTS, LAST, SUBJECT
from pmet_lightning.analysis.layer_choice import LIKELY, NO_EVIDENCE, SURE
from pmet_lightning.analysis.measures import LEAST_FACTS
from pmet_lightning.analysis.study import Findings
from pmet_lightning.analysis.tracing import LAST_TOKEN, SUBJECT_LAST
from pmet_lightning.report.html import plain
from pmet_lightning.utils.files import write_csv, write_json

log = logging.getLogger(__name__)

_NUMBERS = ("mean", "low", "high", "count")
_LAYER_COLUMNS = ("phase", "measure", "token", "layer", "component", "answer", *_NUMBERS)
_TRACING_COLUMNS = ("phase", "component", "layer", "place", *_NUMBERS)
_FACT_COLUMNS = (
    "phase", "case_id", "relation", "prompt", "subject", "true", "new", "followed", "p_true", "p_new", "p_corrupted",
)  # fmt: skip
_COLUMNS_ARE = "columns: attention (attn) and FFN (ffn), at the subject's last token and at the prompt's last token"
_HEADS = {
    "cosine": "of what goes into the component and what comes out",
    "overlap": "share of the likeliest tokens that input and output have in common",
    "added to logit": "by how much its output raises the answer's logit above that of an average token",
    "indirect effect": "how much of P(answer), lost to noise on the subject, returns when its output is restored",
}
_LENS = "P(answer) if the model ended after that layer"
_POSITIONS = {SUBJECT: SUBJECT_LAST, LAST: LAST_TOKEN}


def write_results(
    folder: Path,
    settings: Mapping[str, Any],
    counts: Mapping[str, Any],
    phases: Sequence[Findings],
    claims: Sequence[Claim],
) -> None:
    """Write analysis.json, the means and intervals as layers.csv and tracing.csv, and the facts as facts.csv.

    Args:
        folder: The folder to write to.
        settings: The settings of the analysis.
        counts: Number of facts read, used and left out.
        phases: The findings of each phase.
        claims: The predictions and their results.
    """
    proposals = {f.phase: proposal.to_dict() for f in phases if (proposal := f.proposal()) is not None}
    content = {
        **summary(settings, phases, claims),
        "facts": counts,
        "proposals": proposals,
        "measures": {f.phase: {name: list(m.rows()) for name, m in f.measures.items()} for f in phases},
    }
    write_json(folder / "analysis.json", plain(content))
    layers = [
        {"phase": f.phase, "measure": name, **row} for f in phases for name, m in f.measures.items()
        if name != "effect" for row in m.rows()
    ]  # fmt: skip
    write_csv(folder / "layers.csv", _LAYER_COLUMNS, layers)
    traced = [
        {"phase": f.phase, **row} for f in phases if "effect" in f.measures for row in f.measures["effect"].rows()
    ]
    if traced:
        write_csv(folder / "tracing.csv", _TRACING_COLUMNS, traced)
    write_csv(folder / "facts.csv", _FACT_COLUMNS, [row for f in phases for row in _fact_rows(f)])


def proposed_layers(folder: Path) -> list[int]:
    """The layers that an analysis has proposed for the unedited model, if it is sure of them or they are likely.

    Args:
        folder: The folder that :func:`write_results` has written to.

    Raises:
        FileNotFoundError: If it has no analysis.json.
        ValueError: If that is not an analysis with causal tracing.
    """
    path = folder / "analysis.json"
    try:
        (proposal, *_) = json.loads(path.read_text(encoding="utf-8"))["proposals"].values()
        layers, verdict = [int(layer) for layer in proposal["layers"]], proposal["verdict"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: expected the result of analyze with causal tracing (--tracing.draws 1 or more), whose proposal "
            "names layers"
        ) from error
    if verdict not in (SURE, LIKELY):
        log.info("%s proposes the layers %s, but: %s; they are not preferred", path, layers, verdict)
        return []
    return layers


def summary(settings: Mapping[str, Any], phases: Sequence[Findings], claims: Sequence[Claim]) -> dict[str, Any]:
    """What the file and the page of an analysis begin with.

    Args:
        settings: The settings of the analysis.
        phases: The findings of each phase.
        claims: The predictions and their results.
    """
    return {
        "settings": settings,
        "window": phases[0].window,
        "conclusions": {f.phase: conclusion(claims, f.phase) for f in phases},
        "claims": [claim.to_dict() for claim in claims],
    }


def _fact_rows(findings: Findings) -> Iterable[dict[str, Any]]:
    for question, answer, p in zip(findings.questions, findings.answers, findings.p.tolist(), strict=True):
        probabilities = dict(zip(("p_true", "p_new", "p_corrupted"), p, strict=True))
        yield {"phase": findings.phase, **vars(question.fact), "followed": answer, **probabilities}


def summary_lines(phases: Sequence[Findings], claims: Sequence[Claim]) -> list[str]:
    """For each phase a table with a row for each layer; then the claims and the proposed layers."""
    lines = []
    for findings in phases:
        lines += [*_table(findings), ""]
    for claim in claims:
        numbers = f"{_format_mean(claim.found)}, {claim.found['count']} facts"
        lines.append(f"{claim.phase}: {claim.text}: {claim.verdict} ({numbers})")
    for findings in phases:
        lines += proposal_lines(findings)
    return lines


def _table(findings: Findings) -> list[str]:
    """Means over facts, for the tracked answer; the columns on the left are those of the subject's last token."""
    names = [f"{component} {token}" for token in (SUBJECT, LAST) for component in COMPONENTS]
    columns = _columns(findings)
    depth = len(next(iter(columns.values())))
    lines = [f"{findings.phase}, {len(findings.questions)} facts{_probabilities(findings)}", _COLUMNS_ARE]
    for head, meaning in _HEADS.items():
        own = [name for name in columns if name.startswith(f"{head}:")]
        if not own:
            continue
        lines += ["", f"{head}: {meaning}"]
        lines.append(" " * 16 + "".join(f"{name:>14}" for name in names))
        lines += [
            f"  layer {layer:<8}" + "".join(f"{columns[name][layer]:14.3f}" for name in own) for layer in range(depth)
        ]
    lens = [name for name in columns if name.startswith("lens:")]
    lines += ["", f"P under the lens: {_LENS}"]
    lines.append(" " * 16 + "".join(f"{name.partition(':')[2]:>14}" for name in lens))
    lines += [f"  layer {i:<8}" + "".join(f"{columns[name][i]:14.3f}" for name in lens) for i in range(depth)]
    return lines


def _probabilities(findings: Findings) -> str:
    """P of the tracked answer, with the clean and with the corrupted subject."""
    text = f", P(answer) {_clean(findings):.3f}"
    return text if "effect" not in findings.measures else f"{text}, corrupted {float(findings.p[:, 2].mean()):.3f}"


def _clean(findings: Findings) -> float:
    """Mean P of the tracked answer, with the clean subject."""
    clean = sum(float(p[ANSWERS.index(answer)]) for answer, p in zip(findings.answers, findings.p, strict=True))
    return clean / len(findings.p)


def _columns(findings: Findings) -> dict[str, list[float]]:
    """Means by layer."""
    measures, columns = findings.measures, {}
    for token in (SUBJECT, LAST):
        columns[f"lens:{token}"] = findings.of_followed("lens", token=token)
        for component in COMPONENTS:
            labels = {"token": token, "component": component}
            columns[f"cosine:{token}{component}"] = measures["cosine"].at(**labels)
            columns[f"overlap:{token}{component}"] = measures["overlap"].at(**labels)
            columns[f"added to logit:{token}{component}"] = findings.of_followed("contribution", **labels)
            if "effect" in measures:
                traced = measures["effect"].at(component=component, place=_POSITIONS[token])
                columns[f"indirect effect:{token}{component}"] = traced
    return {name: values.nanmean(dim=0).tolist() for name, values in columns.items()}


def proposal_lines(findings: Findings, *, named: bool = True) -> list[str]:
    """The proposed layers and how sure they are, in words; nothing without causal tracing.

    Args:
        findings: The findings of a phase.
        named: Whether to begin with the phase.
    """
    proposal = findings.proposal()
    if proposal is None:
        return []
    effect, lead = proposal.effect, proposal.lead
    line = f"{findings.phase}: layers proposed " if named else "Layers proposed "
    line += f"{proposal.layers}: {proposal.verdict}. "
    if effect["count"] < LEAST_FACTS:
        line += f"The peak of {effect['count']} facts is layer {proposal.peak}"
    else:
        (a, b), (c, d) = proposal.first, proposal.last
        line += (
            f"Of the resamples of {effect['count']} facts, {100 * proposal.same_layers:.0f} % give the same layers "
            f"(95 % begin at {_span(a, b)} and end at {_span(c, d)}) and {100 * proposal.same_peak:.0f} % the same "
            f"peak, layer {proposal.peak}"
        )
    took = _clean(findings) - float(findings.p[:, 2].mean())
    line += f" (effect {_format_mean(effect)} of {took:.3f} that the noise took"
    if lead is not None:
        line += f"; {_format_mean(lead)} above the next layer"
    return [line + ")"]


def _span(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"


def copy_line(findings: Findings) -> str | None:
    """The proposed layers as a setting of ``fit``; ``None`` without a proposal, or if the facts speak for none."""
    proposal = findings.proposal()
    if proposal is None or proposal.verdict == NO_EVIDENCE:
        return None
    return f'--model.layers "{proposal.layers}"'


def closing_lines(phases: Sequence[Findings], claims: Sequence[Claim]) -> list[str]:
    """The finding of each phase in a line, and the setting to copy."""
    asked = "is 'attention extracts, the FFN stores' shown?"
    lines = [f"{f.phase}: {asked} {conclusion(claims, f.phase)}" for f in phases]
    copied = copy_line(phases[0])
    return lines if copied is None else [*lines, f"to edit the proposed layers, give fit: {copied}"]


def _format_mean(found: Mapping[str, float]) -> str:
    """A mean and, if there are enough facts for one, its interval."""
    interval = f" [{found['low']:.3f}, {found['high']:.3f}]" if found["count"] >= LEAST_FACTS else ""
    return f"{found['mean']:.3f}{interval}"
