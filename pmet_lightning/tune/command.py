"""The command ``tune``: finds the settings for a model, and writes them as a configuration."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pmet_lightning.analysis.options import LoadOptions, load_with_encoder
from pmet_lightning.data.records import ZsreTarget
from pmet_lightning.model.architectures import Architecture
from pmet_lightning.moments.store import MOMENTS_FOLDER
from pmet_lightning.targets.construction import Construction
from pmet_lightning.targets.target_optimizer import OptimizedSites
from pmet_lightning.utils.types import NonNegativeInt, PositiveFloat, PositiveInt

if TYPE_CHECKING:
    from pmet_lightning.tune.facts import Facts, Item

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TunedModel(LoadOptions):
    """The model that settings are sought for.

    Attributes:
        architecture: Module paths of a model family that is not recognized.
    """

    architecture: Architecture | None = None


@dataclass(frozen=True)
class OwnFacts:
    """Facts of one's own.

    Attributes:
        path: Edits in any format that fit reads; they are divided at random, by subject, into records to tune on and
            records to report. Null takes shipped ones that the model knows.
        split: Split of a hub data set.
        zsre_target: The new object of a zsRE record: the first of ``answers``, or ``alt``.
    """

    path: str | list[str] | None = None
    split: str = "train"
    zsre_target: ZsreTarget = "answers"

    def items(self) -> list[Item] | None:
        """The facts, if there are some."""
        from pmet_lightning.tune.facts import read_items

        return None if self.path is None else read_items(self.path, self.split, self.zsre_target)

    @property
    def source(self) -> str:
        """Where they come from, in words."""
        return self.path if isinstance(self.path, str) else ", ".join(self.path or [])


@dataclass(frozen=True)
class MomentOptions:
    """Second moments of the keys, of all layers that may be edited; a later fit finds them.

    Attributes:
        corpus: Text as for fit; the effect of the edits is measured on it, too. Null takes text that the model itself
            writes or, for the bundled world, its corpus.
        corpus_subset: Subset of a hub data set.
        samples: Number of texts; 'auto' adds texts until the moments no longer change.
        length: Tokens in a row that texts are packed into.
        folder: Where moments are stored.
    """

    corpus: str | None = None
    corpus_subset: str | None = None
    samples: PositiveInt | str = "auto"
    length: PositiveInt = 256
    folder: str = MOMENTS_FOLDER


def tune(
    model: TunedModel = TunedModel(),  # noqa: B008
    data: OwnFacts = OwnFacts(),  # noqa: B008
    moments: MomentOptions = MomentOptions(),  # noqa: B008
    out: str = "tuned",
    minutes: PositiveFloat = 30.0,
    trials: PositiveInt | None = None,
    edits: PositiveInt | None = None,
    optimize: list[OptimizedSites] | None = None,
    targets: list[Construction] | None = None,
    analysis: str | None = None,
    seed: NonNegativeInt = 0,
    storage: str | None = None,
) -> None:
    """Find the settings for a model: its layers, how targets are found, and how they are written.

    The result is a configuration for fit (tuned.yaml), a page (tuned.html), and all that was measured (trials.tsv,
    tuned.json). A search that was stopped goes on where it was, by the same command.

    Args:
        model: The model.
        data: Facts of one's own.
        moments: Second moments of the keys.
        out: Folder of the search and its result.
        minutes: Time that the search may take, with the time before it was stopped. The figure at the end, and the
            second moments, if they are not stored yet, come on top.
        trials: Number of trials instead of a time: the same number and seed give the same answer.
        edits: Edits to be written in one edit batch later; null takes as many as records and time allow, up to 200.
        optimize: What may get a delta: attn+ffn and ffn (PMET and its ablation), hidden (MEMIT); null tries all.
        targets: Where targets of layers may come from (--spread.targets); null tries all but own.
        analysis: Folder of an analysis of this model: layers that it proposes as sure or likely are looked at first.
        seed: Seed of the search and of the division of one's own facts.
        storage: Address of a database of Optuna that several machines search in together, each by this command; null
            takes a file in the folder.

    Raises:
        FileNotFoundError: If there is no such model or file.
        FileExistsError: If the folder holds another search.
        RecordError: If a record is invalid, or there are too few.
        ValueError: If the model knows too few of the shipped facts, the device is unknown, or the analysis is none.
    """
    from pmet_lightning.model.loading import set_plain_outputs
    from pmet_lightning.tune.bench import Bench
    from pmet_lightning.tune.budget import Budget
    from pmet_lightning.tune.facts import choose_facts
    from pmet_lightning.tune.results import closing_lines, write_results
    from pmet_lightning.tune.tuned import run_search
    from pmet_lightning.utils.console import quieten, quietly

    folder, budget = Path(out).expanduser(), Budget.of(minutes, trials, edits, optimize, targets, analysis)
    quieten()
    with quietly():
        lm, encoder = load_with_encoder(model)
        set_plain_outputs(lm)
    facts = choose_facts(lm, encoder, model.model_name, data.items(), data.source, seed, model.tokens_per_batch)
    base = base_sections(model, moments, facts, seed)
    bench = Bench(lm, encoder.tokenizer, model.model_name, base, folder / "targets")
    tuned = run_search(bench, facts, budget, folder, seed, storage)
    write_results(tuned, folder)
    log.info("%s", "\n".join(closing_lines(tuned, folder)))


def base_sections(model: TunedModel, moments: MomentOptions, facts: Facts, seed: int) -> dict[str, dict[str, Any]]:
    """The settings that all trials share, by section."""
    loaded = {name: value for name, value in vars(model).items() if name not in ("model_name", "device")}
    from pmet_lightning.tune.space import PRESERVE_PROMPTS, STEPS

    kept = {name: value for name, value in loaded.items() if value != getattr(TunedModel(), name)}
    given = {name: value for name, value in asdict(moments).items() if value is not None}
    return {
        "model": {"steps": STEPS, "keep_float32": True, **kept, "seed": seed},
        "data": {},
        "moments": {"corpus": facts.world.corpus, **given},
        "spread": {"preserve_prompts": PRESERVE_PROMPTS},
        "drift": facts.world.drift(moments.corpus, moments.corpus_subset),
    }
