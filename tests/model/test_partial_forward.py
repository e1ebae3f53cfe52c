"""Layers called without the model around them, and nothing that makes the host wait between two looks."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from pmet_lightning import TargetOptimizer
from pmet_lightning.data.records import parse_record
from pmet_lightning.model.forward import label_logits
from pmet_lightning.model.partial_forward import PartialForward, Replay
from pmet_lightning.model.prefix_passes import split_at_subject
from pmet_lightning.targets import target_optimizer as module_of_targets
from pmet_lightning.targets.loop import TargetLoop
from tests.model.test_prefix_passes import rows_of
from tests.tiny import CONFIGS, CONTEXTS, RECORDS, save_tiny

# What makes a host wait for its device: it needs a value, or the number of values, to go on.
WAITS = ("_local_scalar_dense", "nonzero", "unique", "aten.equal", "masked_select", "bincount", "is_nonzero")

OLD_OPT = pytest.mark.skipif(transformers.__version__ < "5", reason="OPT of transformers 4 looks into every mask")


class Waits(TorchDispatchMode):
    """Counts what would make the host wait, were the tensors on another device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        indices = args[1] if "aten.index" in str(func) and isinstance(args[1], (list, tuple)) else ()
        self.count += any(name in str(func) for name in WAITS)
        self.count += any(i is not None and i.dtype == torch.bool for i in indices)
        return func(*args, **(kwargs or {}))


class InTrainer:
    """What Lightning hands out inside a Trainer: the optimizer, and its step."""

    def __init__(self, optimizer):
        self.optimizer, self.step = optimizer, optimizer.step


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_layers_called_directly_give_what_the_model_gives(family, loaded):
    model, sites, tokenizer = loaded(family)
    rows = rows_of(tokenizer, "right")
    prefix, tails = split_at_subject(model, rows, 4)
    layers = [sites.module("hidden", i) for i in range(4)]
    partial_forward = PartialForward(layers, 2)
    _, entering = partial_forward.entering_states(model, tails, prefix)
    replay = Replay([partial_forward.layer, *partial_forward.above], prefix)
    assert not replay.ready
    with partial_forward.start_from(entering, partial_forward.layer), replay.capture_inputs():
        before = label_logits(model, tails, prefix)
    assert replay.ready
    changed = entering + torch.randn(entering.shape, generator=torch.Generator().manual_seed(2))
    with partial_forward.start_from(changed, partial_forward.layer):
        expected = label_logits(model, tails, prefix)
    places, real = tails.label_positions(), tails.label_ids >= 0
    for _ in range(2):  # no run leaves anything in the cache
        left = replay.run(changed)
        found = partial_forward.logits(model, left.flatten(0, 1)[places.flatten()]).unflatten(0, places.shape)
        torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)
    assert float((expected - before)[real].abs().max()) > 1e-2


def test_layers_that_get_no_cache_are_not_called_directly(loaded):
    model, sites, tokenizer = loaded("llama")
    prefix, tails = split_at_subject(model, rows_of(tokenizer, "right"))
    replay = Replay([sites.module("hidden", 0)], prefix)
    with replay.capture_inputs():
        model(tails.input_ids, use_cache=False)
    assert not replay.ready


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama", "gemma2", pytest.param("opt", marks=OLD_OPT), "bloom"])
def test_the_host_waits_for_no_step(family, tmp_path, monkeypatch):
    """Between two synchronizations, once the same edits have been active for a step."""
    monkeypatch.setitem(module_of_targets.SYNC_EVERY, "cpu", 4)
    counts: list[int] = []
    iterate = TargetLoop.iterate

    def watched(loop, *args):
        with Waits() as waits:
            result = iterate(loop, *args)
        counts.append(waits.count)
        return result

    monkeypatch.setattr(TargetLoop, "iterate", watched)
    module = TargetOptimizer(
        save_tiny(family, tmp_path), layers=[1], steps=9, contexts=CONTEXTS, loss_tolerance=0.0, kl_factor=0.1,
        optimizer=partial(torch.optim.Adam, lr=0.1),
    )  # fmt: skip
    module.setup("fit")
    module.configure_model()
    module.contexts, optimizer = CONTEXTS, module.configure_optimizers()
    module.optimizers = lambda: InTrainer(optimizer)
    module.find_targets([parse_record(record, i, "") for i, record in enumerate(RECORDS)])
    assert len(counts) == 9
    assert counts[0] > 0  # places of labels are looked up
    assert counts[1:] == [0] * 8
