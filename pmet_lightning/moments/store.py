"""Files of second moments C = E[k kᵀ] of keys over general text, and of their Cholesky factors.

Legend: I = in-features (d_k).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pmet_lightning.model.architectures import ProjectionId, name_of
from pmet_lightning.model.fingerprint import checksum
from pmet_lightning.solver.cholesky import Factor, factorize
from pmet_lightning.solver.packed import pack_lower, unpack_lower, unpack_symmetric
from pmet_lightning.utils.errors import PmetError
from pmet_lightning.utils.tensor_files import save_tensors

log = logging.getLogger(__name__)

MOMENTS_FOLDER = "~/.cache/pmet_lightning/moments"


class MomentError(PmetError):
    """Second moments that do not belong to the model, or that there is no memory for."""


@dataclass(frozen=True)
class MomentKey:
    """What a stored moment depends on besides site and layer.

    Attributes:
        model: Fingerprint of the weights.
        tokenizer: Fingerprint of the tokenizer.
        corpus: Fingerprint of the corpus.
        samples: Number of texts, or 'auto' with its tolerance.
        length: Tokens in a row.
        dtype: Precision of the model.
        seed: Seed of the order of the texts.
        modules: Paths of the projections, where they are described by hand and not known by the family: keys of two
            modules of one width are not each other's.
    """

    model: str
    tokenizer: str
    corpus: str
    samples: str
    length: int
    dtype: str
    seed: int
    modules: str = ""

    def folder(self) -> str:
        """Name of the folder that holds the moments of all layers."""
        described = {name: value for name, value in vars(self).items() if name != "modules" or value}
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:24]

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> MomentKey:
        """The key that the metadata of a stored moment holds.

        Raises:
            KeyError: If it holds none.
            ValueError: If a number is none.
        """
        texts = {name: metadata[name] for name in ("model", "tokenizer", "corpus", "samples", "dtype")}
        numbers = {name: int(metadata[name]) for name in ("length", "seed")}
        return cls(**texts, **numbers, modules=metadata.get("modules", ""))  # type: ignore[arg-type]


class MomentStore:
    """Moments of one key in one folder, a file for each site and layer.

    Args:
        folder: The folder itself. One that ROME or MEMIT filled (.npz files with sums and counts) can be read too.
        read_only: Whether nothing may be added to it.
    """

    def __init__(self, folder: str | Path, read_only: bool = False) -> None:
        self.folder, self.read_only = Path(folder).expanduser(), read_only

    def path(self, projection_id: ProjectionId) -> Path:
        """The file of a site and layer."""
        return self.folder / f"{name_of(projection_id)}.safetensors"

    def save(
        self,
        projection_id: ProjectionId,
        moment_II: Tensor,
        tokens: int,
        key: MomentKey,
        name: str = "",
        corpus_name: str = "",
    ) -> None:
        """Store a mean second moment: one triangle of it, in float32; with the names of model and corpus, to show."""
        lower = pack_lower(moment_II.to(torch.float32).cpu())
        metadata = {
            **vars(key),
            "name": name,
            "corpus_name": corpus_name,
            "site": projection_id[0],
            "layer": projection_id[1],
            "tokens": tokens,
            "width": len(moment_II),
            "checksum": checksum(lower),
        }
        described = {name: str(value) for name, value in metadata.items()}
        save_tensors(self.path(projection_id), {"lower": lower}, described)

    def model(self, projection_id: ProjectionId) -> str | None:
        """Fingerprint of the model that a moment is of; ``None`` if there is none, or ROME or MEMIT made it."""
        path = self.path(projection_id)
        return _read_metadata(path)[0].get("model") if path.is_file() else None

    def check(self, projection_id: ProjectionId, model: str, width: int, weight_name: str) -> None:
        """Check that a moment is there and is of this model, layer and width, without reading all of it.

        Raises:
            FileNotFoundError: If it is not there.
            MomentError: If it belongs to something else or is broken; the message says what was expected and found.
        """
        path = self.path(projection_id)
        if not path.is_file():
            if self._npz(weight_name) is None:
                raise FileNotFoundError(f"no second moments {str(path)!r}; run the command 'stats' to collect them")
            return
        found, entries = _read_metadata(path)
        expected = {"model": model, "site": projection_id[0], "layer": str(projection_id[1])}
        for name, value in expected.items():
            if found.get(name) != value:
                raise MomentError(
                    f"{path}: second moments of another {name}: expected {value}, found {found.get(name)}; "
                    "set --moments.given to null to collect them"
                )
        if found.get("width") != str(width) or entries != width * (width + 1) // 2:
            raise MomentError(f"{path}: expected width {width}, found {found.get('width')} with {entries} numbers")

    def load(self, projection_id: ProjectionId, width: int, weight_name: str) -> Tensor:
        """A moment that has passed :meth:`check`, shape [I, I], float32.

        Raises:
            MomentError: If the file is broken, or an .npz file is of another width.
        """
        path = self.path(projection_id)
        if not path.is_file():
            return self._from_npz(width, weight_name)
        try:
            with safe_open(path, framework="pt") as file:
                return unpack_symmetric(file.get_tensor("lower"), width)
        except (SafetensorError, OSError) as error:
            raise _broken(path, error) from error

    def factor(self, projection_id: ProjectionId, width: int, weight_name: str, device: torch.device) -> Factor:
        """Cholesky factor of a moment (plus a ridge where it is singular), float64, stored beside it.

        A stored factor has the checksum of its moment; if it matches, the moment itself is not read.

        Returns:
            The factor, on the device, and its ridge.
        """
        path = self.path(projection_id).with_suffix(".factor.safetensors")
        moment_checksum = (
            _read_metadata(self.path(projection_id))[0].get("checksum", "")
            if self.path(projection_id).is_file()
            else ""
        )
        try:
            with safe_open(path, framework="pt") as file:
                found = file.metadata() or {}
                if moment_checksum and found.get("checksum") == moment_checksum and "ridge" in found:
                    lower_II = unpack_lower(file.get_tensor("lower"), width).to(device)
                    return Factor(lower_II, float(found["ridge"]))
        except (SafetensorError, OSError):
            pass  # absent or broken: computed again
        factor = factorize(lambda: self.load(projection_id, width, weight_name).to(device).double())
        if not self.read_only:
            metadata = {"checksum": moment_checksum, "ridge": repr(factor.ridge)}
            save_tensors(path, {"lower": pack_lower(factor.lower_II.cpu())}, metadata)
        return factor

    def _npz(self, weight_name: str) -> Path | None:
        """A file of sums and counts that ROME or MEMIT made for a weight."""
        module = weight_name.removesuffix(".weight")
        return next(iter(sorted(self.folder.glob(f"{module}_*mom2*.npz"))), None)

    def _from_npz(self, width: int, weight_name: str) -> Tensor:
        path = self._npz(weight_name)
        assert path is not None, "check() has found it"
        try:
            with np.load(path) as file:
                total, count = torch.from_numpy(file["mom2.mom2"]), float(file["mom2.count"])
        except (KeyError, ValueError, OSError) as error:
            raise MomentError(f"{path}: expected arrays mom2.mom2 and mom2.count ({error})") from error
        if list(total.shape) != [width, width]:
            raise MomentError(f"{path}: expected width {width}, found shape {list(total.shape)}")
        log.warning("%s: used as it is; such a file does not say which model it belongs to", path)
        return (total.double() / count).float()


def _read_metadata(path: Path) -> tuple[dict[str, str], int]:
    """Metadata of a stored moment, and the length of its packed triangle."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, int(file.get_slice("lower").get_shape()[0])
    except (SafetensorError, OSError) as error:
        raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> MomentError:
    return MomentError(f"{path}: unreadable second moments ({error}); delete the file")


def stored_moments(folder: str | Path) -> Iterator[dict[str, str]]:
    """What is stored in a folder of moments: the metadata of every file, with its path."""
    for path in sorted(Path(folder).expanduser().glob("*/*.safetensors")):
        if path.suffixes[-2:-1] == [".factor"]:
            continue
        try:
            with safe_open(path, framework="pt") as file:
                yield {**(file.metadata() or {}), "path": str(path)}
        except (SafetensorError, OSError):
            yield {"path": str(path), "model": "unreadable"}
