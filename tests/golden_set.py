"""The golden set of the repository, laid out as the larger ones are; tests/golden/README.md describes its files."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.harness import Case

SOURCE = Path(__file__).resolve().parent / "golden" / "gpt2"
SET = "pmet_ffn_easy_float64"


def unpack(folder: Path) -> Case:
    """Write the model, the second moments and the expected numbers to a folder.

    Returns:
        The case, as :func:`~tests.harness.run_golden` takes it.
    """
    shutil.copytree(SOURCE / "model", folder / "model")
    shutil.copy(SOURCE / "meta.json", folder)
    save_file(_weights(SOURCE / "weights.npz"), folder / "model" / "model.safetensors", metadata={"format": "pt"})
    moments, numbers = {}, {}
    with np.load(SOURCE / "numbers.npz") as packed:
        for name in packed.files:
            if name.startswith("moment/"):
                moments[name.removeprefix("moment/")] = _moment(packed[name])
            elif name.endswith("/left"):
                product = name.removesuffix("/left")
                numbers[product] = packed[name] @ packed[f"{product}/right"]
            elif not name.endswith("/right"):
                numbers[name] = packed[name]
    np.savez(folder / "cov.npz", **moments)
    np.savez(folder / f"{SET}.npz", **numbers)
    return Case(folder, SET)


def _weights(path: Path) -> dict[str, np.ndarray]:
    """Each tensor is whole multiples of a power of two; all tensors lie one after the other."""
    weights, start = {}, 0
    with np.load(path) as packed:
        folded = _joined(packed["planes"]).astype(np.int64)
        multiples = (folded >> 1) ^ -(folded & 1)  # 0, 1, 2, 3, 4, … are 0, −1, 1, −2, 2, …
        for name, shape, exponent in zip(packed["names"], packed["shapes"], packed["exponents"], strict=True):
            shape = shape[shape > 0]  # the second size of a vector is 0
            part = multiples[start : start + shape.prod(dtype=int)].reshape(shape)
            weights[str(name)] = np.ldexp(part, -int(exponent)).astype(np.float32)
            start += part.size
    return weights


def _moment(planes: np.ndarray) -> np.ndarray:
    """A symmetric float32 matrix from the rows of its lower triangle."""
    lower = _joined(planes).view("<f4")
    width = int(np.sqrt(2 * lower.size))
    moment = np.zeros((width, width), dtype=np.float32)
    moment[np.tril_indices(width)] = lower
    return moment + np.tril(moment, -1).T


def _joined(planes: np.ndarray) -> np.ndarray:
    """Whole numbers from their bytes: a row of the lowest bytes, a row of the next, and so on."""
    whole = np.zeros((planes.shape[1], 4), dtype=np.uint8)
    whole[:, : len(planes)] = planes.T
    return whole.view("<u4").ravel()
