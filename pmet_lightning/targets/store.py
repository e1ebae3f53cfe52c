"""The result of the target optimization for each edit, and a store that keeps it for later runs.

Legend: B = edits, A = those that took a given step, F = model width, S = steps, P = parts of the loss and P(o*).
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pmet_lightning.model.architectures import ProjectionId, name_of, projection_of
from pmet_lightning.utils.tensor_files import save_tensors

# What is kept of each step of an edit: the loss and its weighted parts, P(o*) over the contexts and at the bare prompt.
PARTS = ("loss", "loss_nll", "loss_kl", "loss_norm", "p", "p_prompt")
# Why an edit stops: its loss is low, its target tokens are the argmax, or it is out of steps.
STOP_REASONS = ("loss", "argmax", "steps")
QUARTILES = {"q25": 0.25, "q75": 0.75}  # of the loss and P(o*) over the edits: between them lies the middle half
_BEFORE = ("p_before", "p_prompt_before")
_HISTORY = "history"  # name of the history in a file, where the other tensors have names of sites and layers


@dataclass(frozen=True)
class Target:
    """The target of one edit.

    Attributes:
        values: v* of each optimized site in each layer that has a target, shape [F], float32 (float64 for a float64
            model), on the CPU.
        record: Plain numbers for the ledger: steps, stop reason, loss parts, P(o*) before and after.
        history_SP: ``PARTS`` of each step it took, shape [S, parts], on the CPU.
    """

    values: dict[ProjectionId, Tensor]
    record: dict[str, Any]
    history_SP: Tensor


def join_targets(targets: Sequence[Target]) -> Target:
    """One target of the targets that an edit has in several layers: of the last one, with the values of all.

    The numbers of layers below get the layer's number, as in ``p_after_3``; a target that was joined has them already.
    """
    *below, last = targets
    values = {place: value for target in targets for place, value in target.values.items()}
    lower = {
        f"{name}_{max(layer for _, layer in target.values)}" if name in last.record else name: value
        for target in below for name, value in target.record.items()
    }  # fmt: skip
    return Target(values, last.record | lower, last.history_SP)


def since_unedited(target: Target) -> Target:
    """A target of layers that were written one after the other, with P(o*) before of the unedited model."""
    first = min(layer for _, layer in target.values)
    before = {name: target.record[f"{name}_{first}"] for name in _BEFORE if f"{name}_{first}" in target.record}
    return replace(target, record=target.record | before)


def stack_values(targets: Sequence[Target], projection_id: ProjectionId) -> Tensor:
    """Values of one site and layer, shape [B, F]."""
    return torch.stack([target.values[projection_id] for target in targets])


def name_values(values: Mapping[ProjectionId, Tensor]) -> dict[str, Tensor]:
    """Values with the names that files give them: site and layer, as in ``ffn-7``."""
    return {name_of(place): value for place, value in values.items()}


def values_of_names(named: Mapping[str, Tensor]) -> dict[ProjectionId, Tensor]:
    """The reverse of :func:`name_values`.

    Raises:
        ValueError: If a name is not that of a site and a layer.
    """
    return {projection_of(name): value for name, value in named.items()}


class TargetStore:
    """A folder of the targets of one layer, each under the hash of everything it depends on.

    What a pass makes of a target in the layers above is a file of its own: the target is found by a run that has no use
    for the rest.

    Args:
        folder: The folder; created when the first target is saved.
        depends: Fingerprints and settings shared by all edits: model weights, tokenizer, contexts, hyper-parameters,
            the layer.
        later: Sites of layers above in which a target has values, too.
    """

    def __init__(self, folder: str | Path, depends: Mapping[str, Any], later: Sequence[ProjectionId] = ()) -> None:
        self.folder, self.later = Path(folder).expanduser(), list(later)
        self._base = json.dumps(depends, sort_keys=True, default=str)
        self._later_base = f"{self._base} {','.join(map(name_of, self.later))}"

    def load(self, identity: str) -> Target | None:
        """The stored target, or ``None``; an unreadable file counts as absent and is replaced."""
        target = self._read(self._path(self._base, identity))
        if target is None or not self.later:
            return target
        above = self._read(self._path(self._later_base, identity))
        return None if above is None else replace(target, values=target.values | above.values)

    def save(self, identity: str, target: Target) -> None:
        """Store a target; a reader never sees a partial file."""
        above = {place: target.values[place] for place in self.later}
        here = {place: value for place, value in target.values.items() if place not in above}
        self._write(self._path(self._base, identity), replace(target, values=here))
        if above:
            self._write(self._path(self._later_base, identity), Target(above, {}, target.history_SP[:0]))

    def _path(self, base: str, identity: str) -> Path:
        """File of the edit with this :meth:`~pmet_lightning.data.records.Edit.identity`."""
        return self.folder / f"{hashlib.sha256((base + identity).encode()).hexdigest()[:32]}.safetensors"

    def _read(self, path: Path) -> Target | None:
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                record = json.loads(file.metadata()["record"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                history = tensors.pop(_HISTORY)
                return Target(values_of_names(tensors), record, history)
        except (SafetensorError, KeyError, ValueError, TypeError, OSError):
            return None

    def _write(self, path: Path, target: Target) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.contiguous() for name, value in name_values(target.values).items()}
        save_tensors(path, tensors | {_HISTORY: target.history_SP}, {"record": json.dumps(target.record)})


def mean_curves(targets: Sequence[Target]) -> list[dict[str, float]]:
    """Means at each step over the edits that took it, and the number of these edits (``active_edits``)."""
    if not targets:
        return []
    points, lengths_B = [], torch.tensor([len(target.history_SP) for target in targets])
    for step, all_BP in enumerate(pad_histories(targets).unbind(dim=1)):
        here_AP = all_BP[lengths_B > step]
        means = dict(zip(PARTS, here_AP.mean(dim=0).tolist(), strict=True))
        points.append({"step": float(step), **means, "active_edits": float(len(here_AP))})
    return points


def overall_curves(targets: Sequence[Target]) -> list[dict[str, float]]:
    """At each step, means and quartiles over all edits: one that has stopped keeps its last values.

    Unlike those of :func:`mean_curves`, these means do not jump when easy edits stop and leave the hard ones behind.

    Returns:
        For each step ``step``, the mean of each of ``PARTS``, ``loss_q25``, ``loss_q75``, ``p_q25``, ``p_q75``, and
        how many edits took the step (``active_edits``).
    """
    if not targets:
        return []
    histories_BSP, lengths_B = pad_histories(targets), torch.tensor([len(target.history_SP) for target in targets])
    means_SP = histories_BSP.mean(dim=0)
    columns = {name: means_SP[:, i] for i, name in enumerate(PARTS)}
    for name, level in itertools.product(("loss", "p"), QUARTILES):
        columns[f"{name}_{level}"] = histories_BSP[..., PARTS.index(name)].quantile(QUARTILES[level], dim=0)
    columns["active_edits"] = (lengths_B > torch.arange(len(means_SP)).unsqueeze(1)).sum(dim=1)
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [{"step": float(step), **dict(zip(columns, map(float, row), strict=True))} for step, row in enumerate(rows)]


def pad_histories(targets: Sequence[Target]) -> Tensor:
    """Histories padded to one length: an edit that has stopped keeps its last values; shape [B, S, parts]."""
    histories = [target.history_SP for target in targets]
    longest = max(map(len, histories))
    return torch.stack([torch.cat([h, h[-1:].expand(longest - len(h), -1)]) for h in histories])
