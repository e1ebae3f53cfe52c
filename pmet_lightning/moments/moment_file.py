"""One file with stored second moments, to hand to somebody else (docs/models.md: the file format)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pmet_lightning.model.architectures import ProjectionId, SiteName, name_of
from pmet_lightning.model.fingerprint import checksum
from pmet_lightning.moments.store import MomentError, MomentKey, MomentStore
from pmet_lightning.utils.tensor_files import TensorFile, digest_of, save_tensor_files, save_tensors
from pmet_lightning.utils.versions import versions

FORMAT = 1
_MANIFEST = "moments"  # the metadata entry


@dataclass(frozen=True)
class MomentFile:
    """A file that holds moments, checked.

    Attributes:
        path: The file.
        moments: By the name of its tensor, the metadata of each moment, as it was stored.
    """

    path: Path
    moments: Mapping[str, Mapping[str, str]]

    @classmethod
    def read(cls, path: str | Path) -> MomentFile:
        """The moments of a file, all of which is read and checked.

        Raises:
            FileNotFoundError: If there is no such file.
            MomentError: If it is not such a file, of a later format, or not as it was written.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"no file {str(path)!r}; expected one that 'moments export' has written")
        try:
            with safe_open(path, framework="pt") as file:
                manifest = json.loads((file.metadata() or {})[_MANIFEST])
                _check_format(path, manifest["format"])
                names = sorted(file.keys())
                digest = digest_of(((name, file.get_tensor(name)) for name in names), manifest)
            moments = manifest["moments"]
            whole = digest == manifest["digest"] and names == sorted(map(_name_of, moments.values())) == sorted(moments)
        except MomentError:
            raise
        except (SafetensorError, OSError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise MomentError(
                f"{path}: not second moments, or broken ({error}); expected a file that 'moments export' has written"
            ) from error
        if not whole:
            raise MomentError(
                f"{path}: is not as it was written (its digest differs); take it from where it was copied"
            )
        return cls(path, moments)

    @property
    def keys(self) -> set[MomentKey]:
        """What the moments depend on: one key for each model and text."""
        return {MomentKey.of(found) for found in self.moments.values()}

    def add_to(self, folder: str | Path) -> tuple[list[Path], list[Path]]:
        """Add the moments to a cache: all of them, or, if that fails, none.

        Args:
            folder: The cache.

        Returns:
            The files that were added, and those that were there already, which are left as they are.

        Raises:
            OSError: If they cannot be written.
        """
        paths = {name: _store_of(folder, found).path(_projection(found)) for name, found in self.moments.items()}
        there = [path for path in paths.values() if path.is_file()]
        missing = {name: path for name, path in paths.items() if path not in there}
        save_tensor_files(self._files(missing))
        return list(missing.values()), there

    def _files(self, paths: Mapping[str, Path]) -> Iterator[TensorFile]:
        with safe_open(self.path, framework="pt") as file:
            for name, path in paths.items():
                yield TensorFile(path, {"lower": file.get_tensor(name)}, self.moments[name])


def write_moment_file(path: str | Path, chosen: Iterable[Mapping[str, str]]) -> None:
    """Write stored moments as one file.

    Args:
        path: The .safetensors file.
        chosen: What :func:`~pmet_lightning.moments.store.stored_moments` says of them.

    Raises:
        MomentError: If one of them is not as it was stored.
        OSError: If the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    moments: dict[str, dict[str, str]] = {}
    for found in chosen:
        kept = {entry: value for entry, value in found.items() if entry != "path"}
        name = _name_of(found)
        tensors[name], moments[name] = _stored(Path(found["path"]), found), kept
    described = {"format": FORMAT, "versions": versions(), "moments": moments}
    described["digest"] = digest_of(sorted(tensors.items()), described)
    save_tensors(path, tensors, {_MANIFEST: json.dumps(described)})


def choose(
    stored: Iterable[Mapping[str, str]],
    model: str | None = None,
    corpus: str | None = None,
    layers: Sequence[int] | None = None,
) -> list[Mapping[str, str]]:
    """Those of some stored moments that are of a model, a corpus and layers; ``None`` takes all.

    Args:
        stored: What :func:`~pmet_lightning.moments.store.stored_moments` says of them.
        model: Name or fingerprint.
        corpus: Name or fingerprint.
        layers: Layers.

    Raises:
        MomentError: If there are none for one of the layers, or none at all; the message says what there is.
    """
    there = [found for found in stored if "layer" in found]  # others are unreadable
    named = [
        found
        for found in there
        if model in (None, found.get("name"), found["model"])
        and corpus in (None, found.get("corpus_name"), found["corpus"])
    ]
    chosen = [found for found in named if layers is None or int(found["layer"]) in layers]
    missing = sorted(set(layers or ()) - {int(found["layer"]) for found in chosen})
    if missing or not chosen:
        known = {f"{found.get('name')} over {found.get('corpus_name')}, layer {found['layer']}" for found in there}
        raise MomentError(
            f"no second moments {f'of layers {missing}' if missing else 'to choose'}: expected some of those that are "
            f"stored ({'; '.join(sorted(known)) or 'none'})"
        )
    return chosen


def _check_format(path: Path, found: int) -> None:
    if found != FORMAT:
        raise MomentError(
            f"{path}: second moments of format {found}, found by a program that reads format {FORMAT}; update "
            "pmet-lightning"
        )


def _stored(path: Path, found: Mapping[str, str]) -> Tensor:
    """The triangle of a stored moment."""
    try:
        with safe_open(path, framework="pt") as file:
            lower: Tensor = file.get_tensor("lower")
    except (SafetensorError, OSError) as error:
        raise MomentError(f"{path}: unreadable second moments ({error}); delete the file") from error
    if lower.dtype != torch.float32 or checksum(lower) != found.get("checksum"):
        raise MomentError(f"{path}: second moments that are not as they were stored; delete the file")
    return lower


def _projection(found: Mapping[str, str]) -> ProjectionId:
    """Site and layer; ``ValueError`` for another site, which could be the path of any file."""
    sites = get_args(SiteName)
    return sites[sites.index(found["site"])], int(found["layer"])


def _store_of(folder: str | Path, found: Mapping[str, str]) -> MomentStore:
    return MomentStore(Path(folder).expanduser() / MomentKey.of(found).folder())


def _name_of(found: Mapping[str, str]) -> str:
    """The name of a moment's tensor: the place of its file in a cache."""
    return f"{MomentKey.of(found).folder()}/{name_of(_projection(found))}"
