"""Second moments C = E[k kᵀ] of keys over general text: summed in one pass for many layers, stored for reuse.

Legend: T = tokens, I = in-features (d_k).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pmet_lightning.architectures import SiteName, Sites, in_features
from pmet_lightning.files import atomic_path
from pmet_lightning.language_model import checksum, run_to
from pmet_lightning.sites import stop_after
from pmet_lightning.solve import Factor, factorise
from pmet_lightning.tokens import RowBatch, TokenRow, pad_rows

log = logging.getLogger(__name__)

MOMENTS_FOLDER = "~/.cache/pmet_lightning/moments"

Place = tuple[SiteName, int]
_BLOCK_ROWS = 512


class MomentError(ValueError):
    """Second moments that do not belong to the model, or that there is no room for."""


@dataclass(frozen=True)
class MomentKey:
    """What a stored moment depends on besides site and layer.

    Attributes:
        model: Fingerprint of the weights.
        tokenizer: Fingerprint of the tokenizer.
        corpus: Fingerprint of the corpus.
        samples: Texts used, or 'auto' with its tolerance.
        length: Tokens of a row.
        dtype: Precision of the model.
        seed: Seed of the order of the texts.
    """

    model: str
    tokenizer: str
    corpus: str
    samples: str
    length: int
    dtype: str
    seed: int

    def folder(self) -> str:
        """Name of the folder that holds the moments of all layers."""
        return hashlib.sha256(json.dumps(vars(self), sort_keys=True).encode()).hexdigest()[:24]


def packed_lower(symmetric_II: Tensor) -> Tensor:
    """The lower triangle of a symmetric matrix, row by row, shape [I · (I + 1) / 2]."""
    return torch.cat([row[: i + 1] for i, row in enumerate(symmetric_II)])


def unpacked_symmetric(packed: Tensor, width: int) -> Tensor:
    """The symmetric matrix of :func:`packed_lower`, shape [I, I]."""
    return symmetric(unpacked_lower(packed, width))


def symmetric(lower_II: Tensor) -> Tensor:
    """Fill the upper triangle from the lower one, in place: such matrices are too large for a copy."""
    for start in range(0, len(lower_II), _BLOCK_ROWS):
        end = start + _BLOCK_ROWS
        lower_II[:start, start:end] = lower_II[start:end, :start].T
        diagonal = lower_II[start:end, start:end]
        diagonal.copy_(diagonal.tril() + diagonal.tril(-1).T)
    return lower_II


def unpacked_lower(packed: Tensor, width: int) -> Tensor:
    """The lower triangular matrix of :func:`packed_lower`, zero above the diagonal, shape [I, I]."""
    lower_II = packed.new_zeros(width, width)
    start = 0
    for i in range(width):
        lower_II[i, : i + 1] = packed[start : start + i + 1]
        start += i + 1
    return lower_II


def unpacked_products(packed: Tensor, device: torch.device) -> Tensor:
    """The symmetric matrix of :func:`packed_lower`, on a device, shape [I, I]."""
    return unpacked_symmetric(packed.to(device), (math.isqrt(8 * len(packed) + 1) - 1) // 2)


def save_products(path: Path, products: Mapping[Place, Tensor]) -> None:
    """Store symmetric matrices, each as :func:`packed_lower` has it, in place of what is there."""
    with atomic_path(path) as temporary:
        save_file({f"{site}-{layer}": packed for (site, layer), packed in products.items()}, temporary)


def load_products(path: Path) -> dict[Place, Tensor]:
    """What :func:`save_products` has stored, packed as it is and on the CPU.

    A matrix goes to the model's device when it is worked with; they are too many for it.
    """
    found: dict[Place, Tensor] = {}
    for name, packed in load_file(path).items():
        site, layer = name.split("-")
        found[site, int(layer)] = packed  # type: ignore[index]
    return found


class MomentStore:
    """Moments of one key in one folder, a file for each site and layer.

    Args:
        folder: The folder itself. One that ROME or MEMIT filled (.npz files with sums and counts) can be read too.
        read_only: Whether nothing may be added to it.
    """

    def __init__(self, folder: str | Path, read_only: bool = False) -> None:
        self.folder, self.read_only = Path(folder), read_only

    def path(self, place: Place) -> Path:
        """The file of a site and layer."""
        return self.folder / f"{place[0]}-{place[1]}.safetensors"

    def save(self, place: Place, moment_II: Tensor, tokens: int, key: MomentKey) -> None:
        """Store a mean second moment, one triangle of it in float32."""
        lower = packed_lower(moment_II.to(torch.float32).cpu())
        described = {
            **vars(key),
            "site": place[0],
            "layer": place[1],
            "tokens": tokens,
            "width": len(moment_II),
            "checksum": checksum(lower),
        }
        with atomic_path(self.path(place)) as temporary:
            save_file({"lower": lower}, temporary, metadata={name: str(value) for name, value in described.items()})

    def check(self, place: Place, model: str, width: int, weight_name: str) -> None:
        """See that a moment is there and is of this model, layer and width, without reading it whole.

        Raises:
            FileNotFoundError: If it is not there.
            MomentError: With expected and found, if it belongs to something else or is broken.
        """
        path = self.path(place)
        if not path.is_file():
            if self._npz(weight_name) is None:
                raise FileNotFoundError(f"no second moments {str(path)!r}; run the verb 'stats' to collect them")
            return
        found, entries = self._described(path)
        expected = {"model": model, "site": place[0], "layer": str(place[1])}
        for name, value in expected.items():
            if found.get(name) != value:
                raise MomentError(
                    f"{path}: second moments of another {name}: expected {value}, found {found.get(name)}; "
                    "set --moments.given to null to collect them"
                )
        if found.get("width") != str(width) or entries != width * (width + 1) // 2:
            raise MomentError(f"{path}: expected width {width}, found {found.get('width')} with {entries} numbers")

    def load(self, place: Place, width: int, weight_name: str) -> Tensor:
        """A moment that :meth:`check` has found in order, shape [I, I], float32.

        Raises:
            MomentError: If the file is broken, or an .npz file is of another width.
        """
        path = self.path(place)
        if not path.is_file():
            return self._from_npz(width, weight_name)
        try:
            with safe_open(path, framework="pt") as file:
                return unpacked_symmetric(file.get_tensor("lower"), width)
        except (SafetensorError, OSError) as error:
            raise _broken(path, error) from error

    def factor(self, place: Place, width: int, weight_name: str, device: torch.device) -> Factor:
        """Cholesky factor of a moment (plus a ridge where it is singular), float64, kept beside it.

        A kept factor is known by the checksum of the moment that it is of, and the moment is not read then.

        Returns:
            The factor, on the device, and its ridge.
        """
        path = self.path(place).with_suffix(".factor.safetensors")
        kept = self._described(self.path(place))[0].get("checksum", "") if self.path(place).is_file() else ""
        try:
            with safe_open(path, framework="pt") as file:
                found = file.metadata() or {}
                if kept and found.get("checksum") == kept and "ridge" in found:
                    lower_II = unpacked_lower(file.get_tensor("lower"), width).to(device)
                    return Factor(lower_II, float(found["ridge"]))
        except (SafetensorError, OSError):
            pass  # absent or broken: made anew
        factor = factorise(lambda: self.load(place, width, weight_name).to(device).double())
        if not self.read_only:
            with atomic_path(path) as temporary:
                described = {"checksum": kept, "ridge": repr(factor.ridge)}
                save_file({"lower": packed_lower(factor.lower_II.cpu())}, temporary, metadata=described)
        return factor

    def _described(self, path: Path) -> tuple[dict[str, str], int]:
        try:
            with safe_open(path, framework="pt") as file:
                return file.metadata() or {}, int(file.get_slice("lower").get_shape()[0])
        except (SafetensorError, OSError) as error:
            raise _broken(path, error) from error

    def _npz(self, weight_name: str) -> Path | None:
        """A file of sums and counts that ROME or MEMIT made for a weight."""
        module = weight_name.removesuffix(".weight")
        return next(iter(sorted(self.folder.glob(f"{module}_*mom2*.npz"))), None)

    def _from_npz(self, width: int, weight_name: str) -> Tensor:
        path = self._npz(weight_name)
        assert path is not None, "check has found it"
        try:
            with np.load(path) as file:
                total, count = torch.from_numpy(file["mom2.mom2"]), float(file["mom2.count"])
        except (KeyError, ValueError, OSError) as error:
            raise MomentError(f"{path}: expected arrays mom2.mom2 and mom2.count ({error})") from error
        if list(total.shape) != [width, width]:
            raise MomentError(f"{path}: expected width {width}, found shape {list(total.shape)}")
        log.warning("%s: taken as it is; such a file does not say which model it is of", path)
        return (total.double() / count).float()


def _broken(path: Path, error: Exception) -> MomentError:
    return MomentError(f"{path}: unreadable second moments ({error}); delete the file")


def stored_moments(folder: str | Path) -> Iterator[dict[str, str]]:
    """What is kept in a folder of moments: the description of every file, with its path."""
    for path in sorted(Path(folder).expanduser().glob("*/*.safetensors")):
        if path.suffixes[-2:-1] == [".factor"]:
            continue
        try:
            with safe_open(path, framework="pt") as file:
                yield {**(file.metadata() or {}), "path": str(path)}
        except (SafetensorError, OSError):
            yield {"path": str(path), "model": "unreadable"}


def list_moments(folder: str = MOMENTS_FOLDER) -> None:
    """Show the second moments that are kept.

    Args:
        folder: Where they are kept (--moments.folder of the other verbs).
    """
    columns = ("model", "site", "layer", "width", "tokens", "samples", "length", "dtype", "corpus", "path")
    rows = [columns, *(tuple(found.get(name, "-") for name in columns) for found in stored_moments(folder))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    for row in rows:
        sys.stdout.write("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n")


class MomentSums:
    """Running Σ k kᵀ of some projections: products of a batch in the model's precision, their sum in float64.

    Args:
        model: The language model.
        sites: Its modules.
        places: Sites and layers.
        pad_id: Padding token; padded positions are left out exactly.
        device: Where the model is.
    """

    def __init__(
        self, model: nn.Module, sites: Sites, places: Sequence[Place], pad_id: int, device: torch.device
    ) -> None:
        self.model, self.pad_id, self.device = model, pad_id, device
        self.modules = {place: sites.module(*place) for place in places}
        self.last = sites.layers[max(layer for _, layer in places)]
        self.tokens = 0
        # The lower triangles hold the sums, what is above is no use.
        self.lower = {
            place: torch.zeros(in_features(m), in_features(m), dtype=torch.float64, device=device)
            for place, m in self.modules.items()
        }

    @torch.no_grad()
    def add(self, rows: Sequence[TokenRow]) -> None:
        """Add every token of some rows, in one pass that ends after the last layer."""
        batch: RowBatch = pad_rows(rows, self.pad_id).to(self.device)
        mask_RT = batch.attention_mask.bool()
        self.tokens += int(mask_RT.sum())
        with ExitStack() as stack:
            for place, module in self.modules.items():
                stack.enter_context(_sum_inputs(module, mask_RT, self.lower[place]))
            with stop_after(self.last):
                run_to(self.model, batch)


@contextmanager
def _sum_inputs(module: nn.Module, mask_RT: Tensor, lower_II: Tensor) -> Iterator[None]:
    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        keys_TI = inputs[0].reshape(*mask_RT.shape, -1)[mask_RT.to(inputs[0].device)]
        keys_TI = keys_TI.to(lower_II.device, torch.promote_types(keys_TI.dtype, torch.float32))
        # The product is symmetric: block rows up to the diagonal are about half of it.
        for start in range(0, len(lower_II), _BLOCK_ROWS):
            end = start + _BLOCK_ROWS
            lower_II[start:end, :end] += keys_TI[:, start:end].T @ keys_TI[:, :end]

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def memory_groups(widths: Mapping[Place, int], available: int) -> list[list[Place]]:
    """Places whose sums fit into memory together; each group is a pass of its own over the corpus.

    A place needs its sum in float64 and its last moment in float32 all the time, and one float64 matrix to work on.

    Args:
        widths: d_k of each place, in order.
        available: Free bytes.

    Raises:
        MomentError: If not even one place fits.
    """
    groups: list[list[Place]] = [[]]
    used = 0
    for place, width in widths.items():
        kept, working = 12 * width * width, 8 * width * width
        if kept + working > available:
            raise MomentError(
                f"the second moments of {place[0]} in layer {place[1]} need {(kept + working) / 2**30:.1f} GiB for "
                f"keys of width {width}, and {available / 2**30:.1f} GiB are free; expected a machine with more memory"
            )
        if used + kept + working > available:
            groups.append([])
            used = 0
        groups[-1].append(place)
        used += kept
    return groups
