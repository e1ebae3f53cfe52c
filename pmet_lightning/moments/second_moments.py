"""A callback that provides the second moments before the first edit: found in a folder, or collected."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.core.mixins import HyperparametersMixin
from torch import Tensor

from pmet_lightning.data.corpus import corpus_fingerprint, is_at_hand
from pmet_lightning.data.encoder import PromptEncoder
from pmet_lightning.evaluation.editable import EditableModel
from pmet_lightning.model.architectures import ProjectionId, WriteChoice, written_sites
from pmet_lightning.model.projections import in_features
from pmet_lightning.moments.collection import Collection, CollectionSettings
from pmet_lightning.moments.store import MOMENTS_FOLDER, MomentError, MomentKey, MomentStore, stored_moments
from pmet_lightning.moments.sums import memory_groups
from pmet_lightning.solver.cholesky import Factor
from pmet_lightning.solver.null_space import NullSpace, null_space
from pmet_lightning.utils.distributed import ProcessGroup
from pmet_lightning.utils.memory import free_memory
from pmet_lightning.utils.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

log = logging.getLogger(__name__)


class SecondMoments(HyperparametersMixin, L.Callback):
    """Second moments of the edited layers, stored by model, tokenizer, corpus, samples, length, precision and seed.

    Args:
        corpus: A local file (.jsonl, .csv or .parquet with a column 'text', or plain text with one text per line), a
            hub data set with a column 'text', the shipped 'atlas-corpus', or 'sampled-corpus': text that the model
            itself writes, where no other is at hand. A file need not be there if moments over it are stored.
        corpus_subset: Subset of a hub data set; null takes '20231101.en' for 'wikimedia/wikipedia', and none for other
            data sets. Ignored for any other text.
        samples: Number of texts. 'auto' adds texts until the moments no longer change (4 to 32 tokens for each key
            dimension).
        tolerance: With 'auto', the relative change with the last doubling of the text below which no more is added.
        length: Tokens in a row that texts are packed into.
        seed: Seed of the order of the texts.
        folder: Where moments are stored; a matching one is used, a missing one is collected.
        given: A folder with moments made elsewhere, by this program or by ROME or MEMIT (.npz), used as it is and
            never added to.
        save_every: Seconds between two saves of an unfinished collection.
        write: Which sites are edited; linked to --spread.write on the command line.
    """

    def __init__(
        self,
        corpus: str = "wikimedia/wikipedia",
        corpus_subset: str | None = None,
        samples: PositiveInt | Literal["auto"] = "auto",
        tolerance: PositiveFloat = 0.05,
        length: PositiveInt = 128,
        seed: NonNegativeInt = 0,
        folder: str = MOMENTS_FOLDER,
        given: str | None = None,
        save_every: NonNegativeFloat = 60.0,
        write: WriteChoice = "ffn",
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        count = None if samples == "auto" else int(samples)
        self.settings = CollectionSettings(
            corpus, corpus_subset, count, float(tolerance), int(length), int(seed), float(save_every)
        )
        self.folder = Path(folder).expanduser()
        self.given = given
        self.sites = written_sites(write)
        self._store: MomentStore | None = None
        self._module: EditableModel | None = None
        self._stored_key: MomentKey | None = None  # of the stored moments that are used, if they are all there
        self._null_spaces: dict[tuple[ProjectionId, float], NullSpace] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that every moment that the write will need is there; collect those that are missing.

        Raises:
            MomentError: If a stored moment is of another model, layer or width, or there is no memory for one.
            FileNotFoundError: If the corpus, or a moment in ``given``, is not there.
            CorpusError: If the corpus has no text.
        """
        assert isinstance(pl_module, EditableModel)
        config: Any = pl_module.model.config
        longest = getattr(config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and longest < self.settings.length:
            log.info("rows of %d tokens instead of %d: the model has no more positions", longest, self.settings.length)
            self.settings = replace(self.settings, length=int(longest))
        projection_ids = pl_module.sites.written(self.sites, pl_module.written_layers)
        widths = {
            projection_id: in_features(pl_module.sites.module(*projection_id)) for projection_id in projection_ids
        }
        self._stored_key = self._find_stored(pl_module, projection_ids)
        key = self.key(pl_module)
        store = MomentStore(self.given or self.folder / key.folder(), read_only=self.given is not None)
        missing = {p: w for p, w in widths.items() if not self.given and not store.path(p).is_file()}
        missing = trainer.strategy.broadcast(missing)
        if missing and pl_module.edits_done:
            raise MomentError(
                f"moments of layers {sorted({layer for _, layer in missing})} are no longer in {store.folder}, "
                "and those of the edited model would differ; take the edits back, or put the files back"
            )
        if missing:
            log.info(
                "no second moments for layers %s of this model in %s: collecting them over %s",
                sorted({layer for _, layer in missing}), store.folder, self.settings.described(),
            )  # fmt: skip
            # All processes must make the same passes, on devices that need not have the same memory.
            groups = memory_groups(missing, ProcessGroup.of(trainer).all_reduce_min(free_memory(pl_module.device)))
            if len(groups) > 1:
                log.info("they do not fit into memory together: %d passes over the corpus", len(groups))
            for group in groups:
                Collection(self.settings, trainer, pl_module, group, store, key).run()
        model = key.model
        if (
            self.given
            and pl_module.origin is not None
            and store.model(projection_ids[0]) == pl_module.origin.fingerprint
        ):
            model = pl_module.origin.fingerprint  # an edited model may be given the moments of its base
        for projection_id, width in widths.items():
            store.check(projection_id, model, width, pl_module.sites.weight_name(*projection_id))
        if self._store is None or self._store.folder != store.folder:
            self._null_spaces.clear()
        self._store, self._module = store, pl_module
        log.info("second moments of %d projections ready in %s", len(projection_ids), store.folder)

    def moment(self, projection_id: ProjectionId) -> Tensor:
        """The second moment of a projection, shape [I, I], float32, read from its file at every call."""
        store, width, name, _ = self._stored(projection_id)
        return store.load(projection_id, width, name)

    def factor(self, projection_id: ProjectionId) -> Factor:
        """Cholesky factor of a moment, float64, on the module's device; stored beside the moment."""
        store, width, name, device = self._stored(projection_id)
        return store.factor(projection_id, width, name, device)

    def null_space(self, projection_id: ProjectionId, share: float) -> NullSpace:
        """Null space of a moment, on the module's device; computed once, and kept on the CPU (8 · I · R bytes).

        Args:
            projection_id: The projection.
            share: As for :func:`~pmet_lightning.solver.null_space.null_space`.

        Raises:
            ValueError: As :func:`~pmet_lightning.solver.null_space.null_space`.
        """
        device = self._stored(projection_id)[-1]
        if (projection_id, share) not in self._null_spaces:
            self._null_spaces[projection_id, share] = null_space(self.moment(projection_id).to(device), share).to("cpu")
        return self._null_spaces[projection_id, share].to(device)

    def _stored(self, projection_id: ProjectionId) -> tuple[MomentStore, int, str, torch.device]:
        assert self._store is not None, "on_fit_start has not run"
        assert self._module is not None
        sites = self._module.sites
        return (
            self._store,
            in_features(sites.module(*projection_id)),
            sites.weight_name(*projection_id),
            self._module.device,
        )

    def _find_stored(self, module: EditableModel, projection_ids: Sequence[ProjectionId]) -> MomentKey | None:
        """The key of moments that are all stored: of the model that this one was edited from, or its own."""
        self._stored_key = None
        if self.given:
            return None
        own, origin = self.key(module), module.origin
        keys = [own] if origin is None else [replace(own, model=origin.fingerprint, dtype=origin.dtype), own]
        for key in keys:
            for stored in (key, *self._over_absent_corpus(key)):
                store = MomentStore(self.folder / stored.folder())
                if not all(store.path(projection_id).is_file() for projection_id in projection_ids):
                    continue
                if origin is not None and stored.model == origin.fingerprint:
                    log.info("the model is an edited %s: its second moments are those of the base model", origin.model)
                if stored != key:
                    log.info("%s is not here: second moments that are stored for it are used", self.settings.corpus)
                return stored
        return None

    def _over_absent_corpus(self, key: MomentKey) -> list[MomentKey]:
        """The key of stored moments that differ in the corpus only, where it is a file of a name that is not here.

        Raises:
            MomentError: If several files of that name were used.
        """
        name = Path(self.settings.corpus).name
        if is_at_hand(self.settings.corpus):
            return []
        named = [MomentKey.of(found) for found in stored_moments(self.folder) if found.get("corpus_name") == name]
        keys = sorted({one for one in named if replace(one, corpus=key.corpus) == key}, key=MomentKey.folder)
        if len(keys) > 1:
            raise MomentError(
                f"--moments.corpus {self.settings.corpus} is not here, and second moments over {len(keys)} texts of "
                f"that name are stored in {self.folder}; expected one of {', '.join(k.folder() for k in keys)} as "
                "--moments.given"
            )
        return keys

    def key(self, module: EditableModel) -> MomentKey:
        """What the moments of this run depend on."""
        if self._stored_key is not None:
            return self._stored_key
        settings = self.settings
        return MomentKey(
            model=module.base_fingerprint,
            tokenizer=PromptEncoder(module.tokenizer).fingerprint(),  # the corpus is plain text even for a chat
            corpus="" if self.given else corpus_fingerprint(settings.corpus, settings.subset),
            samples=f"auto {settings.tolerance}" if settings.samples is None else str(settings.samples),
            length=settings.length,
            dtype=str(next(module.model.parameters()).dtype).removeprefix("torch."),
            seed=settings.seed,
            modules=module.described_modules,
        )
