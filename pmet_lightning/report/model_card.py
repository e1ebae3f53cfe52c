"""The model card of an edited model or of an adapter: README.md of its folder, with the hub's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pmet_lightning.evaluation.scores import METRICS
from pmet_lightning.report.tables import score_cell
from pmet_lightning.utils.files import atomic_path
from pmet_lightning.utils.pretrained import is_gguf
from pmet_lightning.utils.resources import locate

_TEMPLATE = Path(__file__).parent / "templates" / "model_card.md.jinja"
MOST_FACTS = 500  # in a card
_NAMES = {"attn+ffn": "PMET", "ffn": "PMET without the attention's delta", "hidden": "MEMIT's targets"}


def write_card(
    folder: str | Path,
    manifest: Mapping[str, Any],
    scores: Mapping[str, Mapping[str, float]] | None = None,
    weights: Mapping[str, Any] | None = None,
    adapter_rank: int | None = None,
    list_facts: bool = True,
) -> Path:
    """Write the card of an edited model, or of an adapter.

    Args:
        folder: The exported folder.
        manifest: The manifest of its patch.
        scores: Scores before and after, if they are known.
        weights: The edited weights by name; by default those that the manifest lists.
        adapter_rank: Rank of the adapter, if the folder holds one.
        list_facts: Whether the facts that the manifest has are listed, or only their number is named.

    Returns:
        The file.
    """
    from huggingface_hub import ModelCard, ModelCardData

    path = locate(manifest["model"])
    is_file = Path(path).exists()
    data = ModelCardData(
        base_model=None if is_file else manifest["model"],
        library_name="transformers" if adapter_rank is None else "peft",
        pipeline_tag="text-generation",
        license=_license_of(path),
        tags=["model-editing", "pmet"],
    )
    settings = {"layers": manifest["layers"], "contexts": manifest["contexts"], **manifest["settings"]}
    card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        base=Path(manifest["model"]).name if is_file else manifest["model"],
        edits=_counted(manifest["edits"], "edit"),
        edit_batches=_counted(manifest["edit_batches"], "edit batch", "edit batches"),
        method=_NAMES.get(str(settings.get("model.optimize")), "PMET"),
        adapter_rank=adapter_rank,
        dequantized=is_gguf(path),
        quantization=manifest.get("quantization"),
        scores=_score_rows(scores or {}),
        facts=[_fact_cells(fact) for fact in manifest.get("facts", [])[:MOST_FACTS]] if list_facts else [],
        more_facts=max(0, len(manifest.get("facts", [])) - MOST_FACTS),
        weights=list(weights if weights is not None else manifest["weights"]),
        settings=settings,
        fingerprint=manifest["fingerprint"],
    )
    written = Path(folder) / "README.md"
    with atomic_path(written) as temporary:
        temporary.write_text(str(card), encoding="utf-8")
    return written


def _license_of(path: str) -> str | None:
    """The license that the card of a base model in a folder names."""
    from huggingface_hub import ModelCard

    card = Path(path) / "README.md"
    if not card.is_file():
        return None
    try:
        return ModelCard.load(card).data.get("license")
    except ValueError:  # a README that is no card
        return None


def _fact_cells(fact: Mapping[str, Any]) -> list[str]:
    """Question, new object and old object, as cells of a table."""
    question = fact["prompt"].replace("{}", fact["subject"], 1)
    cells = (question, fact["target"], fact["target_true"] or "")
    return [" ".join(cell.split()).replace("|", "\\|") for cell in cells]


def _counted(count: int, one: str, many: str | None = None) -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"


def _score_rows(scores: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """Name, before and after of each score that a phase has."""
    before, after = (scores.get(phase, {}) for phase in ("before", "after"))
    rows = [[name, score_cell(before, name), score_cell(after, name)] for name in METRICS]
    if "perplexity" in before and "perplexity" in after:
        rows.append(["perplexity", f"{before['perplexity']:.4g}", f"{after['perplexity']:.4g}"])
    return [row for row in rows if row[1:] != ["-", "-"]]
