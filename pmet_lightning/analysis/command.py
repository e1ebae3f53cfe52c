"""The command ``analyze``: finds where a model keeps its facts, and which of its layers to edit."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from pmet_lightning.analysis.options import LoadOptions, RecordOptions, load_with_encoder
from pmet_lightning.data.records import ZsreTarget
from pmet_lightning.model.architectures import Architecture, architecture_of
from pmet_lightning.model.projections import Sites
from pmet_lightning.model.quantized_base import quiet_casts
from pmet_lightning.utils.files import new_folder
from pmet_lightning.utils.types import NonNegativeFloat, NonNegativeInt, PositiveInt

if TYPE_CHECKING:
    from pmet_lightning.analysis.study import Findings, Study


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelOptions(LoadOptions):
    """The model that is analyzed.

    Attributes:
        architecture: Module paths of a model family that is not recognized.
        patch: The patch.safetensors of a run: the same facts are analyzed before and after its edits. Without a
            dtype, the model is loaded in the patch's.
    """

    architecture: Architecture | None = None
    patch: str | None = None


@dataclass(frozen=True)
class DataOptions(RecordOptions):
    """The facts.

    Attributes:
        limit: Maximum number of records; null uses all.
        zsre_target: The new object of a zsRE record: the first of ``answers``, or ``alt``.
        least: Facts whose answer has a smaller probability, or is not the model's first choice, are left out.
    """

    limit: PositiveInt | None = 50
    zsre_target: ZsreTarget = "answers"
    least: NonNegativeFloat = 0.1


@dataclass(frozen=True)
class TracingOptions:
    """Causal tracing.

    Attributes:
        noise: Noise on the subject's embeddings, in standard deviations of all subjects' embeddings.
        draws: Draws of the noise for each fact; 0 skips tracing.
        seed: Seed of the noise.
        window: Layers whose attention or FFN outputs are restored together; null uses 10 of 48 layers, as ROME does for
            GPT-2 XL, and as large a share, rounded down, of any other model's: 1 of fewer than 10.
    """

    noise: NonNegativeFloat = 3.0
    draws: NonNegativeInt = 3
    seed: NonNegativeInt = 0
    window: PositiveInt | None = None


@quiet_casts()
def analyze(
    out: str = "analysis",
    model: ModelOptions = ModelOptions(),  # noqa: B008
    data: DataOptions = DataOptions(),  # noqa: B008
    tracing: TracingOptions = TracingOptions(),  # noqa: B008
    top: PositiveInt = 50,
) -> None:
    """Analyze a model: what attention and FFN do with facts it knows, and which layers to edit.

    Args:
        out: Folder of analysis.html, analysis.json, CSV files, figures and TensorBoard events; must be new or empty.
        model: The model, and a patch to compare it with.
        data: The facts.
        tracing: Causal tracing.
        top: Number of highest logits in the vocabulary projections whose overlap is measured.

    Raises:
        FileExistsError: If ``out`` is not empty.
        FileNotFoundError: If the model, the facts or the patch do not exist.
        PatchError: If the patch was made for another model.
        RecordError: If a record is invalid.
        UnknownArchitectureError: If the model's family is unknown, or a layer does not add its attention and FFN to
            the residual stream.
        ValueError: If the model states none of the facts, or the device is unknown.
    """
    with new_folder(out, "--out") as folder:
        from pmet_lightning.analysis.claims import claims_of
        from pmet_lightning.analysis.facts import read_facts
        from pmet_lightning.analysis.figures import figures, write_figures
        from pmet_lightning.analysis.page import PAGE, write_analysis_page
        from pmet_lightning.analysis.results import closing_lines, summary_lines, write_results

        facts = read_facts(data.path, zsre_target=data.zsre_target, **data.selection())
        study = _study(model, data, tracing, top)
        study.ask(facts)
        phases = _phases(study, model, data)
        claims = claims_of(*phases) if len(phases) > 1 else claims_of(phases[0], None)
        counts = {"read": len(facts), "used": len(phases[0].questions), "left_out": dict(study.left_out)}
        settings = {"model": asdict(model), "data": asdict(data), "tracing": asdict(tracing), "top": top}
        write_results(folder, settings, counts, phases, claims)
        drawn = figures(phases)
        write_analysis_page(folder, settings, counts, phases, claims, drawn)
        write_figures(drawn, folder)
    log.info("%s", "\n".join(summary_lines(phases, claims)))
    for reason, count in study.left_out.items():
        log.info("left out: %d of %d facts (%s)", count, len(facts), reason)
    log.info("the page %s/%s shows all this, the files beside it have the numbers", out, PAGE)
    log.info("%s", "\n".join(closing_lines(phases, claims)))


def _study(model: ModelOptions, data: DataOptions, tracing: TracingOptions, top: int) -> Study:
    from pmet_lightning.analysis.study import Scope, Study
    from pmet_lightning.model.loading import load_config
    from pmet_lightning.model.patch import load_patch

    if model.patch is not None:
        manifest = load_patch(model.patch)[1]
        dtype = manifest["dtype"] if model.dtype == "auto" else model.dtype
        model = replace(model, dtype=dtype, quantize=model.quantize or manifest.get("quantize"))
    architecture = architecture_of(load_config(model.model_name, model.trust_remote_code), model.architecture)
    lm, encoder = load_with_encoder(model)
    scope = Scope(top, data.least, tracing.noise, tracing.draws, tracing.seed, tracing.window, model.tokens_per_batch)
    return Study(lm, Sites.of(lm, architecture), encoder, scope)


def _phases(study: Study, model: ModelOptions, data: DataOptions) -> Sequence[Findings]:
    """Findings before and, with a patch, after its edits, on the facts that the model states in both phases."""
    from pmet_lightning.model.fingerprint import fingerprint
    from pmet_lightning.model.patch import apply_patch

    base = fingerprint(study.model) if model.patch is not None else ""
    before, kept = study.measure("before")
    _check_any(before, study, data)
    assert before is not None
    if model.patch is None:
        return [before]
    apply_patch(study.model, study.sites, model.patch, base)
    after, both = study.measure("after", kept)
    _check_any(after, study, data)
    assert after is not None
    return [before.of([kept.index(i) for i in both]), after]


def _check_any(found: Any, study: Study, data: DataOptions) -> None:
    if found is None:
        reasons = "; ".join(f"{count} left out: {reason}" for reason, count in study.left_out.items())
        raise ValueError(
            f"{data.path}: none of the facts can be looked at ({reasons}). Expected facts that the model states; give "
            "others (--data.path), more of them (--data.limit), or a lower --data.least"
        )
