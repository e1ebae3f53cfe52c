"""Keys of several projections in one pass, against one projection after the other."""

from __future__ import annotations

import pytest
import torch

from pmet_lightning.data.encoder import PromptEncoder, load_tokenizer
from pmet_lightning.data.records import parse_record
from pmet_lightning.model.architectures import architecture_of
from pmet_lightning.model.loading import load_config, load_model
from pmet_lightning.model.projections import Sites
from pmet_lightning.write.keys import KeyRows, measure_all_keys, measure_keys
from tests.conftest import mostly_slow
from tests.targets.test_target_optimizer import folder_of  # noqa: F401
from tests.tiny import CONFIGS, CONTEXTS, RECORDS

QUICK = ["gptj", "llama", "falcon", "gemma3"]


@pytest.mark.parametrize("contexts", [CONTEXTS, ()], ids=["contexts", "bare"])
@pytest.mark.parametrize("family", mostly_slow(sorted(CONFIGS), QUICK))
@torch.no_grad()
def test_one_pass_gives_the_keys_of_each(family, contexts, folder_of):  # noqa: F811
    folder = folder_of(family)
    model = load_model(folder)
    sites = Sites.of(model, architecture_of(load_config(folder)))
    edits = [parse_record(record, i, "") for i, record in enumerate(RECORDS)]
    rows = KeyRows.of(edits, contexts, PromptEncoder(load_tokenizer(folder)), 64, torch.device("cpu"))
    written = sites.written(("attn", "ffn"), [1, 2])
    together = measure_all_keys(model, sites, written, rows)
    assert len(written) > 2
    for place, keys in zip(written, together, strict=True):
        torch.testing.assert_close(keys, measure_keys(model, sites, place, [], rows)[0], rtol=0, atol=0)
