"""A callback that has the second moments ready before the first edit: found in a folder, or collected."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import lightning as L
from jsonargparse.typing import PositiveInt
from torch import Tensor

from pmet_lightning.architectures import in_features
from pmet_lightning.module import TargetOptimizer
from pmet_lightning.moments import (
    MomentKey,
    MomentStore,
    Place,
    collect_moments,
    corpus_fingerprint,
    corpus_rows,
    corpus_texts,
)
from pmet_lightning.progress import track
from pmet_lightning.solve import WriteChoice, written_sites
from pmet_lightning.tokens import PromptEncoder

log = logging.getLogger(__name__)


class SecondMoments(L.Callback):
    """Second moments of the edited layers, by model, tokenizer, corpus, count and length.

    Args:
        corpus: A UTF-8 text file with one text a line, a hub data set with a column 'text', or the shipped
            'atlas-corpus'.
        corpus_subset: Subset of a hub data set, such as 20231101.en.
        samples: Texts used.
        length: Most tokens of a text.
        folder: Where moments are kept; a matching one is used, a missing one collected.
        given: A folder with moments made elsewhere, which is used as it is and never added to.
        write: Which sites are edited; linked to --spread.write on the command line.
    """

    def __init__(
        self,
        corpus: str,
        corpus_subset: str | None = None,
        samples: PositiveInt = 100_000,  # type: ignore[valid-type]
        length: PositiveInt = 256,  # type: ignore[valid-type]
        folder: str = "~/.cache/pmet_lightning/moments",
        given: str | None = None,
        write: WriteChoice = "ffn",
    ) -> None:
        self.corpus, self.corpus_subset = corpus, corpus_subset
        self.samples, self.length = samples, length
        self.folder = Path(folder).expanduser()
        self.given = given
        self.sites = written_sites(write)
        self.moments: dict[Place, Tensor] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Load every moment that the spread will ask for; collect those that are missing.

        Raises:
            MomentError: If a stored moment is of another model, layer or width.
            FileNotFoundError: If the corpus, or a moment in ``given``, is not there.
        """
        assert isinstance(pl_module, TargetOptimizer)
        places: list[Place] = [(site, layer) for layer in pl_module.layers for site in self.sites]
        key = self.key(pl_module)
        store = MomentStore(self.given or self.folder / key.folder())
        missing = [] if self.given else [place for place in places if not store.path(place).is_file()]
        if missing:
            log.info(
                "no second moments for layers %s of this model: collecting them over %s texts of %s",
                sorted({layer for _, layer in missing}),
                self.samples,
                self.corpus,
            )
            self._collect(trainer, pl_module, missing, store, key)
        for place in places:
            width = in_features(pl_module.sites.module(*place))
            self.moments[place] = store.load(place, key.model, width)
        log.info("second moments of %d projections ready in %s", len(places), store.folder)

    def key(self, module: TargetOptimizer) -> MomentKey:
        """What the moments of this run depend on."""
        corpus = "" if self.given else corpus_fingerprint(self.corpus, self.corpus_subset)
        return MomentKey(
            module.base_fingerprint,
            PromptEncoder(module.tokenizer).fingerprint(),  # the corpus is plain text even for a chat
            corpus,
            self.samples,
            self.length,
        )

    def _collect(
        self,
        trainer: L.Trainer,
        module: TargetOptimizer,
        places: list[Place],
        store: MomentStore,
        key: MomentKey,
    ) -> None:
        rows = corpus_rows(corpus_texts(self.corpus, self.corpus_subset), module.tokenizer, self.samples, self.length)
        sums, tokens = collect_moments(
            module.model,
            module.sites,
            places,
            rows,
            pad_id=module.encoder.pad_id,
            tokens_per_batch=module.tokens_per_batch,
            device=module.device,
            progress=partial(track, trainer, description="Second moments"),
        )
        for place, total in sums.items():
            store.save(place, total / tokens, tokens, key)
        log.info("second moments over %d texts, %d tokens", len(rows), tokens)
