"""Second moments C = E[k kᵀ] of keys over general text: one pass for all edited layers, stored for reuse.

Legend: T = tokens, I = in-features (d_k).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pmet_lightning.architectures import SiteName, Sites, in_features
from pmet_lightning.files import atomic_path
from pmet_lightning.language_model import run_to
from pmet_lightning.resources import locate
from pmet_lightning.sites import stop_after
from pmet_lightning.tokens import RowBatch, TokenRow, by_token_budget, pad_rows

log = logging.getLogger(__name__)

Place = tuple[SiteName, int]


class MomentError(ValueError):
    """Second moments that do not belong to the model, or text from which none can be formed."""


@dataclass(frozen=True)
class MomentKey:
    """What a stored moment depends on besides site and layer."""

    model: str
    tokenizer: str
    corpus: str
    samples: int
    length: int

    def folder(self) -> str:
        """Name of the folder that holds the moments of all layers."""
        return hashlib.sha256(json.dumps(vars(self), sort_keys=True).encode()).hexdigest()[:24]


class MomentStore:
    """Moments of one key in one folder, a file for each site and layer.

    Args:
        folder: The folder itself.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, place: Place) -> Path:
        """The file of a site and layer."""
        return self.folder / f"{place[0]}-{place[1]}.safetensors"

    def save(self, place: Place, moment_II: Tensor, tokens: int, key: MomentKey) -> None:
        """Store a mean second moment, as float32."""
        described = {**vars(key), "site": place[0], "layer": place[1], "tokens": tokens}
        with atomic_path(self.path(place)) as temporary:
            save_file(
                {"moment": moment_II.to(torch.float32).cpu().contiguous()},
                temporary,
                metadata={name: str(value) for name, value in described.items()},
            )

    def load(self, place: Place, model: str, width: int) -> Tensor:
        """Load a moment and check that it is of this model, layer and width; shape [I, I], float32.

        Raises:
            FileNotFoundError: If it is not there.
            MomentError: With expected and found, if it belongs to something else or is broken.
        """
        path = self.path(place)
        if not path.is_file():
            raise FileNotFoundError(f"no second moments {str(path)!r}; run the verb 'stats' to collect them")
        try:
            with safe_open(path, framework="pt") as file:
                found = file.metadata() or {}
                moment = file.get_tensor("moment")
        except (SafetensorError, OSError) as error:
            raise MomentError(f"{path}: unreadable second moments ({error}); delete the file") from error
        expected = {"model": model, "site": place[0], "layer": str(place[1])}
        for name, value in expected.items():
            if found.get(name) != value:
                raise MomentError(
                    f"{path}: second moments of another {name}: expected {value}, found {found.get(name)}; "
                    "set --moments.given to null to collect them"
                )
        if list(moment.shape) != [width, width]:
            raise MomentError(f"{path}: expected width {width}, found shape {list(moment.shape)}")
        return moment


def corpus_texts(name: str, subset: str | None = None) -> Iterator[str]:
    """Texts of a corpus: the non-empty lines of a local file, or the column 'text' of a hub data set.

    Raises:
        FileNotFoundError: If there is neither.
    """
    found = Path(locate(name))
    if found.is_file():
        with found.open(encoding="utf-8") as file:
            yield from (line.strip() for line in file if line.strip())
        return
    import datasets

    try:
        rows = datasets.load_dataset(name, subset, split="train", streaming=True)
        yield from (row["text"] for row in rows if row["text"].strip())
    except Exception as error:
        raise FileNotFoundError(
            f"no corpus {name!r}: not a local file, and not to be had from the hub ({str(error).splitlines()[0]})."
            " Set --moments.corpus to a UTF-8 text file with one text a line."
        ) from error


def corpus_fingerprint(name: str, subset: str | None = None) -> str:
    """Hash of a local corpus' bytes; name and subset of a hub one."""
    found = Path(locate(name))
    if found.is_file():
        return hashlib.sha256(found.read_bytes()).hexdigest()[:16]
    return f"{name}:{subset}"


def corpus_rows(texts: Iterable[str], tokenizer: Any, samples: int, length: int) -> list[TokenRow]:
    """The first ``samples`` texts as token rows of at most ``length`` tokens.

    Raises:
        MomentError: If the corpus is empty.
    """
    rows = []
    for text in itertools.islice(texts, samples):
        ids = tokenizer(text, truncation=True, max_length=length)["input_ids"]
        if ids:
            rows.append(TokenRow(list(ids)))
    if not rows:
        raise MomentError("the corpus has no text; set --moments.corpus to a file with one text a line")
    return rows


@dataclass
class _Sum:
    """Running Σ k kᵀ of one projection."""

    total_II: Tensor
    mask: Tensor | None = None

    def add(self, keys_RTI: Tensor) -> None:
        assert self.mask is not None
        keys_TI = keys_RTI[self.mask].to(self.total_II.dtype)
        self.total_II.addmm_(keys_TI.T, keys_TI)


@torch.no_grad()
def collect_moments(
    model: nn.Module,
    sites: Sites,
    places: Sequence[Place],
    rows: Sequence[TokenRow],
    *,
    pad_id: int,
    tokens_per_batch: int,
    device: torch.device,
    progress: Any = iter,
) -> tuple[dict[Place, Tensor], int]:
    """Sum k kᵀ over every real token of the rows, for all places in one pass that ends after the last.

    Args:
        model: The language model.
        sites: Its modules.
        places: Sites and layers.
        rows: Token rows.
        pad_id: Padding token; padded positions are left out exactly.
        tokens_per_batch: Most padded tokens in one forward pass.
        device: Where the model is.
        progress: Wraps the list of batches in a progress bar.

    Returns:
        Sums by place, float64, shape [I, I]; and the number of tokens.
    """
    modules = {place: sites.module(*place) for place in places}
    sums = {
        place: _Sum(torch.zeros(in_features(m), in_features(m), dtype=torch.float64, device=device))
        for place, m in modules.items()
    }
    last = sites.layers[max(layer for _, layer in places)]
    batches = by_token_budget([len(row.ids) for row in rows], tokens_per_batch)
    tokens = 0
    with ExitStack() as stack:
        for place, module in modules.items():
            stack.enter_context(_every_input(module, sums[place]))
        for indices in progress(batches):
            batch: RowBatch = pad_rows([rows[i] for i in indices], pad_id).to(device)
            tokens += int(batch.attention_mask.sum())
            for running in sums.values():
                running.mask = batch.attention_mask.bool()
            with stop_after(last):
                run_to(model, batch)
    return {place: running.total_II for place, running in sums.items()}, tokens


@contextmanager
def _every_input(module: nn.Module, into: _Sum) -> Iterator[None]:
    handle = module.register_forward_pre_hook(lambda _, inputs: into.add(inputs[0]))
    try:
        yield
    finally:
        handle.remove()
