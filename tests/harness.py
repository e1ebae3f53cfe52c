"""Runs the editor on golden inputs, and on small ones of the tests' own."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import numpy as np
import torch
import yaml

from pmet_lightning import EditDataModule, SecondMoments, TargetOptimizer, WeightSpread
from pmet_lightning.model.architectures import ProjectionId
from pmet_lightning.model.fingerprint import fingerprint
from pmet_lightning.model.loading import load_model
from pmet_lightning.moments.store import MomentKey, MomentStore
from pmet_lightning.run.lightning_cli import run_fit
from pmet_lightning.solver.weight_delta import WeightDelta
from pmet_lightning.targets.store import PARTS
from pmet_lightning.write import weight_spread as spread_module
from pmet_lightning.write.keys import measure_keys
from pmet_lightning.write.write_report import WriteReport
from tests.tiny import RECORDS


def without_digest(name: str) -> str:
    """The name of a file of protected keys without the digest of its bits; any other name as it is."""
    return re.sub("-past-[0-9a-f]{12}", "-past", name)


def matrices(deltas: Mapping[str, WeightDelta]) -> dict[str, torch.Tensor]:
    """ΔW by weight name, each as one matrix."""
    return {name: delta.dense() for name, delta in deltas.items()}


class KeepReports(L.Callback):
    """Keeps what every edit batch reported, and its keys and values at every write."""

    def __init__(self) -> None:
        self.reports: list[WriteReport] = []
        self.measured: list[tuple[ProjectionId, torch.Tensor, torch.Tensor]] = []

    def measure(self, model, sites, place, values_at, over):
        """In the place of the package's own."""
        keys, values = measure_keys(model, sites, place, values_at, over)
        self.measured.append((place, keys, values[-2]))
        return keys, values

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if "written" in outputs:
            self.reports.append(outputs["written"])


def quiet_trainer(callbacks: Sequence[L.Callback], folder: Path, **kwargs: Any) -> L.Trainer:
    """A trainer that only runs."""
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
        "default_root_dir": folder,
    }
    return L.Trainer(callbacks=list(callbacks), **(options | kwargs))


def store_moments(folder: Path, moments: dict[tuple[str, int], torch.Tensor], model_hash: str) -> str:
    """Write given second moments where SecondMoments(given=…) finds them."""
    store = MomentStore(folder)
    for place, moment in moments.items():
        store.save(place, moment, 1, MomentKey(model_hash, "", "", "1", 1, "float32", 0))
    return str(folder)


def edit(
    module: TargetOptimizer,
    records: list[dict[str, Any]],
    moments: dict[tuple[str, int], torch.Tensor],
    folder: Path,
    *,
    lam: float,
    rule: str = "sqrt",
    write: str = "ffn",
    targets: str = "spread",
    also: Mapping[str, Any] | None = None,
    keep: KeepReports | None = None,
    **data: Any,
) -> tuple[WeightSpread, list[WriteReport]]:
    """Edit records through module, data module and callback (``also``: options of it) in a Lightning trainer."""
    keep = KeepReports() if keep is None else keep
    path = folder / "records.json"
    path.write_text(json.dumps(records))
    reference = load_model(module.model_name, module.dtype_name, module.attn_implementation)
    given = store_moments(folder / "moments", moments, fingerprint(reference))
    spread = WeightSpread(lam=lam, rule=rule, write=write, targets=targets, **(also or {}))
    trainer = quiet_trainer([SecondMoments("", given=given, write=write), spread, keep], folder)
    trainer.fit(module, EditDataModule(str(path), tokenizer=module.model_name, **data))
    return spread, keep.reports


@dataclass(frozen=True)
class Case:
    """One golden set of one architecture."""

    folder: Path
    name: str


@dataclass(frozen=True)
class GoldenRun:
    """What ours computed beside what is expected."""

    meta: dict[str, Any]
    npz: Any
    report: WriteReport
    measured: list[tuple[ProjectionId, torch.Tensor, torch.Tensor]]
    deltas: dict[str, torch.Tensor]

    @property
    def histories(self) -> list[list[dict[str, float]]]:
        """Of each edit, the parts of the loss at each step."""
        return [[dict(zip(PARTS, row, strict=True)) for row in t.history_SP.tolist()] for t in self.report.targets]

    def expected_target(self, i: int, site: str) -> np.ndarray:
        names = {"attn": "attn", "ffn": "mlp", "hidden": "hidden"}
        for key in (f"z/{i}/target_{names[site]}", f"z/{i}/target", f"z/{i}/target_h"):
            if key in self.npz.files:
                return self.npz[key]
        raise KeyError([k for k in self.npz.files if k.startswith(f"z/{i}/")])

    def expected_layer(self, site: str, layer: int) -> tuple[np.ndarray, np.ndarray]:
        template = self.meta["hparams"]["mlp_module_tmp" if site == "ffn" else "attn_module_tmp"]
        base = f"layer/{layer}/{template}/"
        return self.npz[base + "ks"], self.npz[base + "cur_zs"]


def golden_module(case: Case, **changed: Any) -> tuple[TargetOptimizer, dict[str, Any]]:
    """The module with a golden set's settings."""
    meta = json.loads((case.folder / "meta.json").read_text())
    settings = meta["sets"][case.name]
    hp = settings["hparams"]
    memit = case.name.startswith("memit")
    module = TargetOptimizer(
        **{
            "model_name": str(case.folder / "model"),
            "layers": hp["layers"],
            "target_value": "stored",
            "optimize": "hidden" if memit else "attn+ffn",
            "steps": hp["v_num_grad_steps"],
            "optimizer": partial(torch.optim.Adam, lr=hp["v_lr"]),
            "clamp": hp["clamp_norm_factor"],
            "nll_factor": hp.get("nll_loss_factor", 1.0),
            "kl_factor": hp["kl_factor"],
            "norm_factor": hp["v_weight_decay"],
            "contexts": [c for group in meta["context_templates"] for c in group],
            "dtype": settings["dtype"],
            "attn_implementation": "eager",
            **changed,
        }
    )
    return module, meta


def golden_moments(case: Case, hp: dict[str, Any]) -> dict[tuple[str, int], torch.Tensor]:
    cov = np.load(case.folder / "cov.npz")
    moments = {}
    for layer in hp["layers"]:
        for site, template in (("ffn", hp["mlp_module_tmp"]), ("attn", hp["attn_module_tmp"])):
            if template.format(layer) in cov.files:
                moments[site, layer] = torch.from_numpy(cov[template.format(layer)])
    return moments


def run_golden(case: Case, folder: Path, **data: Any) -> GoldenRun:
    """Edit the golden requests as one edit batch."""
    module, meta = golden_module(case)
    settings = meta["sets"][case.name]
    keep = KeepReports()
    with patch.object(spread_module, "measure_keys", keep.measure):
        spread, reports = edit(
            module,
            [{"case_id": r["case_id"], "requested_rewrite": r} for r in meta["requests"]],
            golden_moments(case, settings["hparams"]),
            folder,
            lam=settings["hparams"]["mom2_update_weight"],
            rule="even" if case.name.startswith("memit") else "sqrt",
            write="attn+ffn" if "both" in case.name else "ffn",
            keep=keep,
            **data,
        )
    npz = np.load(case.folder / f"{case.name}.npz")
    return GoldenRun(settings, npz, reports[0], keep.measured, matrices(spread.edited.deltas))


def as_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Options of the command line as :func:`~pmet_lightning.run.lightning_cli.build_fit` takes them."""
    pairs = zip(arguments[::2], arguments[1::2], strict=True)
    return {name.removeprefix("--"): yaml.safe_load(value) for name, value in pairs}


def as_arguments(settings: Mapping[str, Any]) -> list[str]:
    """The same the other way about."""
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()}
    return [part for name, text in texts.items() for part in (f"--{name}", text)]


def tiny_settings(folder: Path, model: str) -> dict[str, Any]:
    """Settings of a fit of two records, with second moments of forty short texts; writes both files."""
    records, corpus = folder / "records.json", folder / "corpus.txt"
    records.write_text(json.dumps(RECORDS[:2]))
    corpus.write_text("\n".join(f"This is the text of number {i}, and it is short." for i in range(40)))
    return {
        "trainer.run_dir": str(folder / "run"),
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": False,
        "trainer.logger": False,
        "model.model_name": model,
        "model.steps": 4,
        "data.path": str(records),
        "moments.corpus": str(corpus),
        "moments.folder": str(folder / "moments"),
    }


def tiny_fit(folder: Path, model: str, *arguments: str, config: str = "pmet.yaml") -> list[dict[str, Any]]:
    """Edit two records of a tiny model.

    Args:
        folder: Where the run folder ``run`` goes.
        model: The model's folder.
        arguments: What else differs from the configuration, as on the command line.
        config: The configuration.

    Returns:
        The ledger of the run.
    """
    folder.mkdir(exist_ok=True)
    run = run_fit(config, tiny_settings(folder, model) | as_overrides(arguments))
    return [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
