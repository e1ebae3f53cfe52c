"""Second moments: the same as a plain sum, stored with what they belong to, resumable, one or more processes."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from itertools import product

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pmet_lightning import SecondMoments
from pmet_lightning.cli.dispatch import main
from pmet_lightning.data.corpus import CorpusError, corpus_fingerprint, corpus_name, corpus_texts, pack_rows
from pmet_lightning.data.encoder import load_tokenizer
from pmet_lightning.model.architectures import architecture_of
from pmet_lightning.model.loading import load_config, load_model
from pmet_lightning.model.projections import Sites, in_features
from pmet_lightning.moments import collection
from pmet_lightning.moments.store import MomentError, MomentKey, MomentStore, stored_moments
from pmet_lightning.moments.sums import MomentSums, memory_groups
from pmet_lightning.solver.cholesky import factorize
from pmet_lightning.solver.packed import pack_lower, symmetrize, unpack_symmetric
from pmet_lightning.solver.update import solve_with_factor
from pmet_lightning.utils.resources import locate
from tests.conftest import mostly_slow
from tests.harness import quiet_trainer
from tests.targets.test_target_optimizer import tiny_module
from tests.tiny import save_tiny

TEXTS = [f"The river number {i} froze early that year" + " and again" * (i % 5) for i in range(200)]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny("gptj", tmp_path_factory.mktemp("m"))


@pytest.fixture(scope="module")
def loaded(folder):
    model = load_model(folder)
    return model, Sites.of(model, architecture_of(load_config(folder))), load_tokenizer(folder)


def plain(model, module, rows):
    """The slow twin: one row at a time through the whole model, in float64."""
    seen = []
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].double()))
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row.ids]))
    handle.remove()
    keys = torch.cat(seen)
    return keys.T @ keys, len(keys)


@pytest.mark.parametrize(("at_once", "block_rows"), mostly_slow(product((1, 3, 64), (512, 48)), [(3, 48)]))
def test_equals_one_row_at_a_time(loaded, at_once, block_rows, monkeypatch):
    monkeypatch.setattr("pmet_lightning.solver.packed.BLOCK_ROWS", block_rows)
    model, sites, tokenizer = loaded
    places = [("ffn", 1), ("ffn", 3), ("attn", 1)]
    rows = list(pack_rows(TEXTS, tokenizer, 12))
    assert len(rows[-1].ids) < 12, "the last row is shorter, and padded among others"
    sums = MomentSums(model, sites, places, pad_id=0, device=CPU)
    for start in range(0, len(rows), at_once):
        sums.add(rows[start : start + at_once])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for place in places:
        expected, tokens = plain(model, sites.module(*place), rows)
        assert sums.tokens == tokens
        assert float((symmetrize(sums.lower[place]) - expected).norm() / expected.norm()) < 1e-6


def test_a_real_model_on_real_text(shared):
    name = str(shared / "data/models/stories260K")
    model, tokenizer = load_model(name, "float32"), load_tokenizer(name)
    sites = Sites.of(model, architecture_of(load_config(name)))
    texts = itertools.islice(corpus_texts(str(shared / "data/wikitext2_valid.raw")), 40)
    rows = list(pack_rows(texts, tokenizer, 96))
    assert {row.ids[0] for row in rows} == {tokenizer.bos_token_id}
    places = [("ffn", layer) for layer in (1, 2, 3)]
    sums = MomentSums(model, sites, places, pad_id=0, device=CPU)
    sums.add(rows)
    for place in places:
        expected, tokens = plain(model, sites.module(*place), rows)
        assert tokens == sums.tokens == sum(len(row.ids) for row in rows)
        assert float((symmetrize(sums.lower[place]) - expected).norm() / expected.norm()) < 1e-6


def test_packing_loses_no_token(loaded):
    tokenizer = loaded[2]
    rows = list(pack_rows(TEXTS, tokenizer, 10))
    assert {len(row.ids) for row in rows[:-1]} == {10}
    assert [id_ for row in rows for id_ in row.ids] == tokenizer(" ".join(TEXTS))["input_ids"]


# ---- corpora ----------------------------------------------------------------------------------------------


# `datasets` waits for five seconds after a table.
TEXT_FILES = ["a.txt", "a.raw", "a.jsonl", "a.csv", "a.parquet"]


@pytest.mark.parametrize("name", mostly_slow(TEXT_FILES, TEXT_FILES[:-1]))
def test_corpora_of_every_kind(name, tmp_path):
    import pandas as pd

    texts = ["one", "two words", "three"]
    (tmp_path / "a.txt").write_text("one\n\n two words \nthree\n", encoding="utf-8")
    (tmp_path / "a.raw").write_text("one\n\n two words \nthree\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts), encoding="utf-8")
    pd.DataFrame({"text": texts}).to_csv(tmp_path / "a.csv", index=False)
    pd.DataFrame({"text": texts}).to_parquet(tmp_path / "a.parquet")
    assert sorted(corpus_texts(str(tmp_path / name))) == sorted(texts)


def test_the_order_is_that_of_the_seed(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(TEXTS), encoding="utf-8")
    one, again, other = (list(corpus_texts(str(path), seed=seed)) for seed in (0, 0, 1))
    assert one == again != other
    assert sorted(one) == sorted(other) == sorted(TEXTS)


def test_unusable_corpora_are_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"local file: \.jsonl.*sampled-corpus"):
        list(corpus_texts("nobody/no-such-corpus"))
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n')
    with pytest.raises(CorpusError, match="expected a column 'text', found body"):
        list(corpus_texts(str(tmp_path / "a.jsonl")))
    (tmp_path / "b.jsonl").write_text("{nonsense\n")
    with pytest.raises(CorpusError, match="unreadable as json"):
        list(corpus_texts(str(tmp_path / "b.jsonl")))


def test_a_corpus_is_known_by_its_bytes(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("one")
    first = corpus_fingerprint(str(path))
    path.write_text("two")
    assert corpus_fingerprint(str(path)) != first
    assert corpus_fingerprint("wikimedia/wikipedia", "20231101.en") == "wikimedia/wikipedia:20231101.en"


@pytest.mark.parametrize(
    ("name", "subset", "shown"),
    [
        ("wikimedia/wikipedia", None, "wikimedia/wikipedia:20231101.en"),
        ("wikimedia/wikipedia", "20231101.de", "wikimedia/wikipedia:20231101.de"),
        ("my/texts", None, "my/texts"),
        ("sampled-corpus", None, "sampled-corpus"),
        ("sampled-corpus", "20231101.en", "sampled-corpus"),
        ("atlas-corpus", "20231101.en", "atlas-corpus"),
    ],
)
def test_a_subset_counts_where_the_hub_has_one(name, subset, shown):
    """What ``tune`` stores without a word about subsets is found again by ``fit``, whose configuration names one."""
    assert corpus_name(name, subset) == shown
    alike = None if subset == "20231101.en" else subset
    assert corpus_fingerprint(name, subset) == corpus_fingerprint(name, alike)


# ---- the store --------------------------------------------------------------------------------------------

KEY = MomentKey("model", "tokenizer", "corpus", "10", 20, "float32", 0)
WEIGHT = "transformer.h.3.mlp.fc_out.weight"


def moment(width: int = 5) -> torch.Tensor:
    root = torch.randn(3 * width, width, generator=torch.Generator().manual_seed(0))
    product = root.T @ root / len(root)
    return (product + product.T) / 2  # symmetric to the last bit


def test_triangles():
    symmetric = moment(7)
    assert pack_lower(symmetric).tolist() == symmetric[tuple(torch.tril_indices(7, 7))].tolist()
    assert torch.equal(unpack_symmetric(pack_lower(symmetric), 7), symmetric)


def test_round_trip_and_list(tmp_path, capsys):
    store = MomentStore(tmp_path / KEY.folder())
    store.save(("ffn", 3), moment(), 99, KEY, "a/model")
    store.factor(("ffn", 3), 5, WEIGHT, CPU)
    store.check(("ffn", 3), "model", 5, WEIGHT)
    assert torch.equal(store.load(("ffn", 3), 5, WEIGHT), moment())
    (found,) = stored_moments(tmp_path)
    assert (found["site"], found["layer"], found["width"], found["tokens"]) == ("ffn", "3", "5", "99")
    main(["stats", "--list", "--folder", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "tokens" in shown
    assert shown.splitlines()[1].startswith("a/model  model  ffn")
    assert str(store.path(("ffn", 3))) in shown


@pytest.mark.parametrize(
    ("place", "model", "width", "message"),
    [
        (("ffn", 3), "another", 5, "another model: expected another, found model"),
        (("ffn", 3), "model", 6, "expected width 6, found 5"),
        (("ffn", 4), "model", 5, "another layer: expected 4, found 3"),
        (("attn", 3), "model", 5, "another site: expected attn, found ffn"),
    ],
)
def test_moments_of_something_else_are_refused(tmp_path, place, model, width, message):
    store = MomentStore(tmp_path)
    store.save(("ffn", 3), moment(), 99, KEY)
    if place != ("ffn", 3):
        store.path(("ffn", 3)).rename(store.path(place))
    with pytest.raises(MomentError, match=message):
        store.check(place, model, width, WEIGHT)


def test_a_broken_or_missing_file_is_said(tmp_path):
    store = MomentStore(tmp_path)
    with pytest.raises(FileNotFoundError, match="stats"):
        store.check(("ffn", 0), "model", 4, WEIGHT)
    store.path(("ffn", 0)).write_bytes(b"nonsense")
    with pytest.raises(MomentError, match="unreadable"):
        store.check(("ffn", 0), "model", 4, WEIGHT)


def test_the_key_depends_on_everything():
    others = {"model": "x", "tokenizer": "x", "corpus": "x", "samples": "11", "length": 21, "dtype": "x", "seed": 1}
    others["modules"] = "model.layers self_attn.o_proj mlp.up_proj"
    assert set(others) == set(vars(KEY))
    keys = [KEY, *(MomentKey(**{**vars(KEY), name: value}) for name, value in others.items())]
    assert len({key.folder() for key in keys}) == len(keys)


def test_files_of_rome_and_memit_are_read(tmp_path):
    """Their layout: sum and count in an .npz that is named after the module."""
    name = "transformer.h.3.mlp.fc_out_float32_mom2_100000.npz"
    np.savez(tmp_path / name, **{"mom2.mom2": (moment() * 7).numpy(), "mom2.count": 7, "sample_size": 7})
    store = MomentStore(tmp_path, read_only=True)
    store.check(("ffn", 3), "any model", 5, WEIGHT)
    torch.testing.assert_close(store.load(("ffn", 3), 5, WEIGHT), moment())
    with pytest.raises(MomentError, match="expected width 6"):
        store.load(("ffn", 3), 6, WEIGHT)
    np.savez(tmp_path / name, other=1)
    with pytest.raises(MomentError, match=r"expected arrays mom2\.mom2"):
        store.load(("ffn", 3), 5, WEIGHT)
    with pytest.raises(FileNotFoundError):
        store.check(("ffn", 4), "any model", 5, "transformer.h.4.mlp.fc_out.weight")


def test_the_factor_is_kept_beside_the_moment(tmp_path, monkeypatch):
    store, place = MomentStore(tmp_path), ("ffn", 3)
    store.save(place, moment(), 99, KEY)
    factor = store.factor(place, 5, WEIGHT, CPU)
    torch.testing.assert_close(factor.lower_II @ factor.lower_II.T, moment().double(), rtol=1e-6, atol=1e-6)
    assert factor.ridge == 0
    calls = []
    monkeypatch.setattr("pmet_lightning.moments.store.factorize", lambda m: calls.append(1) or factorize(m))
    assert torch.equal(store.factor(place, 5, WEIGHT, CPU).lower_II, factor.lower_II)
    assert not calls
    path = store.path(place).with_suffix(".factor.safetensors")
    with safe_open(path, framework="pt") as file:
        save_file({"lower": file.get_tensor("lower")}, path, metadata={"checksum": file.metadata()["checksum"]})
    store.factor(place, 5, WEIGHT, CPU)  # nor is one that does not say its ridge
    assert calls.pop()
    other = moment()
    other[0, 1] = other[1, 0] = 0.1  # the diagonal alone does not tell them apart
    store.save(place, other, 99, KEY)
    store.factor(place, 5, WEIGHT, CPU)  # a factor of another moment is not taken
    assert calls
    given = MomentStore(tmp_path / "given")
    given.save(place, moment(), 99, KEY)
    files = list(given.folder.iterdir())
    MomentStore(given.folder, read_only=True).factor(place, 5, WEIGHT, CPU)
    assert list(given.folder.iterdir()) == files


def test_dead_dimensions_need_a_ridge_only(tmp_path):
    dead = moment()
    dead[2, :] = dead[:, 2] = 0
    store = MomentStore(tmp_path)
    store.save(("ffn", 0), dead, 99, KEY)
    factor = store.factor(("ffn", 0), 5, WEIGHT, CPU)
    assert factor.lower_II.isfinite().all()
    torch.testing.assert_close((factor.lower_II @ factor.lower_II.T).float(), dead, rtol=1e-4, atol=1e-4)
    assert factor.ridge > 0
    kept = store.factor(("ffn", 0), 5, WEIGHT, CPU)
    assert kept.ridge == factor.ridge
    residual, keys = torch.ones(1, 2), torch.eye(5)[:1]
    assert solve_with_factor(residual, keys, kept, 6.0).ridge == 6.0 * factor.ridge


def test_a_plan_for_little_memory():
    widths = {("ffn", layer): 1024 for layer in range(5)}
    one = 1024 * 1024
    assert memory_groups(widths, (5 * 12 + 8) * one) == [list(widths)]
    assert [len(group) for group in memory_groups(widths, (2 * 12 + 8) * one)] == [2, 2, 1]
    with pytest.raises(MomentError, match=r"layer 0 need 15\.3 GiB for keys of width 28672, and 8\.0 GiB are free"):
        memory_groups({("ffn", 0): 28672}, 8 * 2**30)


# ---- collecting -------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(TEXTS), encoding="utf-8")
    return path


def collect(folder, corpus, out, monkeypatch=None, block=4, **changed):
    """Run the callback as fit does; returns it."""
    settings = {"corpus": str(corpus), "folder": str(out), "samples": 150, "length": 16, "save_every": 0.0, **changed}
    if monkeypatch is not None:
        monkeypatch.setattr(collection, "BLOCK", block)
    moments = SecondMoments(**settings)
    trainer = quiet_trainer([moments], out, max_epochs=0)
    trainer.fit(tiny_module(folder, dtype="float32"), train_dataloaders=[])
    return moments


def everything(moments) -> torch.Tensor:
    return torch.stack([moments.moment(("ffn", layer)) for layer in (1, 2)])


def test_the_callback_stores_what_a_plain_sum_gives(folder, corpus, tmp_path, loaded, monkeypatch, caplog):
    caplog.set_level("INFO")
    moments = collect(folder, corpus, tmp_path / "out", monkeypatch)
    texts = itertools.islice(corpus_texts(str(corpus), seed=0), 150)
    rows = list(pack_rows(texts, loaded[2], 16))
    for layer in (1, 2):
        expected, tokens = plain(loaded[0], loaded[1].module("ffn", layer), rows)
        found = moments.moment(("ffn", layer)).double()
        assert float((found - expected / tokens).norm() / found.norm()) < 1e-6
    assert {int(found["tokens"]) for found in stored_moments(tmp_path / "out")} == {tokens}
    assert "doubling the text has changed them by" in caplog.text
    assert not list((tmp_path / "out").glob("*/unfinished*"))
    caplog.clear()
    collect(folder, corpus, tmp_path / "out")
    assert "collecting" not in caplog.text


def test_what_goes_on_is_on_the_device_of_the_sums(folder, corpus, tmp_path, monkeypatch):
    """Sums and last moments; the device is torch's meta, which has no numbers."""
    kept = []
    resume = collection.Collection.resume

    def keep(self):
        kept.append(self)
        resume(self)

    monkeypatch.setattr(collection.Collection, "resume", keep)
    collect(folder, corpus, tmp_path / "out", monkeypatch)
    (whole,) = kept
    whole.previous = {place: torch.eye(128) for place in whole.sums.lower}
    whole.unfinished.mkdir()
    whole._save()
    whole.sums.lower = {place: total.to("meta") for place, total in whole.sums.lower.items()}
    whole.previous = {}
    resume(whole)
    assert {previous.device.type for previous in whole.previous.values()} == {"meta"}
    assert set(whole.previous) == set(whole.sums.lower)


@pytest.mark.parametrize(("at", "samples"), mostly_slow(product((1, 5, 9), (150, "auto")), [(5, 150), (9, "auto")]))
def test_an_interrupted_collection_goes_on(folder, corpus, tmp_path, monkeypatch, at, samples):
    whole = collect(folder, corpus, tmp_path / "whole", monkeypatch, samples=samples, block=2)
    add, calls, fails = MomentSums.add, [], [at]

    def fail(self, rows):
        calls.append(len(rows))
        if len(calls) in fails:
            raise RuntimeError("the power is gone")
        add(self, rows)

    monkeypatch.setattr(MomentSums, "add", fail)
    with pytest.raises(RuntimeError, match="power"):
        collect(folder, corpus, tmp_path / "out", samples=samples)
    fails.clear()
    resumed = collect(folder, corpus, tmp_path / "out", samples=samples)
    assert torch.equal(everything(whole), everything(resumed))
    interrupted = len(calls)
    collect(folder, corpus, tmp_path / "again", samples=samples)
    assert interrupted == len(calls) - interrupted + 1, "only the block that failed was summed again"


def collect_slowly(folder, corpus, out, is_ready):
    """A collection with time to be killed in; for a process of its own."""
    torch.set_num_threads(1)
    collection.BLOCK, add = 1, MomentSums.add

    def slow(self, rows):
        time.sleep(0.02)
        add(self, rows)

    MomentSums.add = slow
    is_ready.set()
    collect(folder, corpus, out)


@pytest.mark.slow
def test_a_killed_process_goes_on(folder, corpus, tmp_path, monkeypatch):
    """SIGKILL at random moments, as often as it takes."""
    whole = collect(folder, corpus, tmp_path / "whole", monkeypatch, block=1)
    # Imports take longer than the collection: one process that has used no thread makes them, and is forked.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    out, kills, rng = tmp_path / "out", 0, random.Random(0)
    while True:
        is_ready = processes.Event()
        process = processes.Process(target=collect_slowly, args=(folder, corpus, out, is_ready))
        process.start()
        assert is_ready.wait(120)
        process.join(rng.uniform(1.0, 2.0) if kills < 2 else 120)
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        kills += 1
    assert process.exitcode == 0
    assert kills > 0
    assert torch.equal(everything(collect(folder, corpus, out)), everything(whole))


def test_auto_stops_when_nothing_changes(folder, tmp_path, monkeypatch, caplog):
    """One sentence over and over has been seen after a few blocks."""
    path = tmp_path / "dull.txt"
    path.write_text("\n".join(["The river froze early that year"] * 3000))
    collect(folder, path, tmp_path / "out", monkeypatch, samples="auto", tolerance=0.05)
    (first, _) = stored_moments(tmp_path / "out")
    width = 4 * 32
    assert collection.LEAST_KEYS * width <= int(first["tokens"]) <= 2 * collection.LEAST_KEYS * width
    collect(folder, path, tmp_path / "out", monkeypatch, samples="auto", tolerance=1e-9)
    most = max(int(found["tokens"]) for found in stored_moments(tmp_path / "out"))
    assert most == pytest.approx(collection.MOST_KEYS * width, rel=0.01)


def test_layers_that_do_not_fit_together_take_turns(folder, corpus, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    together = collect(folder, corpus, tmp_path / "together", monkeypatch)
    monkeypatch.setattr("pmet_lightning.moments.second_moments.free_memory", lambda device: (12 + 8) * 128 * 128)
    apart = collect(folder, corpus, tmp_path / "apart", monkeypatch)
    assert "2 passes over the corpus" in caplog.text
    assert torch.equal(everything(together), everything(apart))


def test_rows_are_no_longer_than_the_model_s_positions(folder, corpus, tmp_path, caplog):
    caplog.set_level("INFO")
    moments = collect(folder, corpus, tmp_path / "out", length=4096)
    assert "rows of 128 tokens instead of 4096" in caplog.text
    assert moments.moment(("ffn", 1)).isfinite().all()


def test_an_empty_corpus_is_said(folder, tmp_path):
    path = tmp_path / "empty.txt"
    path.write_text("\n\n")
    with pytest.raises(CorpusError, match="has no text"):
        collect(folder, path, tmp_path / "out")


def stats_arguments(folder, corpus, out, processes: int) -> list[str]:
    return [
        "stats", "--config", "pmet.yaml", "--model.model_name", folder,
        "--model.layers", "[1, 2]", "--moments.corpus", str(corpus), "--moments.folder", str(out),
        "--moments.length", "16", "--trainer.accelerator", "cpu", "--trainer.devices", str(processes),
        "--trainer.strategy", "ddp" if processes > 1 else "auto", "--trainer.run_dir", str(out / "run"),
        "--trainer.enable_progress_bar", "false",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_number_of_processes_changes_nothing(folder, corpus, tmp_path):
    found = {}
    for processes in (1, 2):
        arguments = stats_arguments(folder, corpus, tmp_path / str(processes), processes)
        if processes == 1:
            main(arguments)
        else:
            command = [sys.executable, "-m", "pmet_lightning", *arguments]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
            assert done.returncode == 0, done.stderr[-3000:]
        (key,) = {path.parent for path in (tmp_path / str(processes)).glob("*/ffn-1.safetensors")}
        store = MomentStore(key)
        found[processes] = [store.load(("ffn", layer), 128, "") for layer in (1, 2)]
        found[processes, "tokens"] = [entry["tokens"] for entry in stored_moments(tmp_path / str(processes))]
    assert found[1, "tokens"] == found[2, "tokens"]
    for one, two in zip(found[1], found[2], strict=True):
        assert float((one - two).norm() / one.norm()) < 1e-6


def test_width_is_that_of_the_keys(loaded):
    assert in_features(loaded[1].module("ffn", 0)) == 4 * 32


def test_the_shipped_corpus_is_enough():
    assert sum(1 for _ in corpus_texts(locate("atlas-corpus"))) > 1000
