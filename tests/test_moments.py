"""Second moments: the same as a plain sum, stored with what they belong to."""

from __future__ import annotations

import pytest
import torch

from pmet_lightning.architectures import Sites, architecture_of, in_features
from pmet_lightning.language_model import load_config, load_model, load_tokenizer
from pmet_lightning.moments import (
    MomentError,
    MomentKey,
    MomentStore,
    collect_moments,
    corpus_fingerprint,
    corpus_rows,
    corpus_texts,
)
from tests.tiny import save_tiny

TEXTS = [f"The river number {i} froze early that year" + " and again" * (i % 5) for i in range(20)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = save_tiny("gptj", tmp_path_factory.mktemp("m"))
    model = load_model(folder)
    return model, Sites.of(model, architecture_of(load_config(folder))), load_tokenizer(folder)


@pytest.mark.parametrize("budget", [10, 64, 4096])
def test_equals_one_text_at_a_time(loaded, budget):
    model, sites, tokenizer = loaded
    places = [("ffn", 1), ("ffn", 3), ("attn", 1)]
    rows = corpus_rows(TEXTS, tokenizer, 100, 12)
    sums, tokens = collect_moments(
        model, sites, places, rows, pad_id=0, tokens_per_batch=budget, device=torch.device("cpu")
    )
    assert tokens == sum(len(row.ids) for row in rows)
    for place in places:
        module, seen = sites.module(*place), []
        handle = module.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0][0].double()))
        with torch.no_grad():
            for text in TEXTS:
                model(torch.tensor([tokenizer(text)["input_ids"][:12]]))
        handle.remove()
        keys = torch.cat(seen)
        expected = keys.T @ keys
        assert float((sums[place] - expected).norm() / expected.norm()) < 1e-6


def test_hooks_are_gone(loaded):
    model, sites, tokenizer = loaded
    rows = corpus_rows(TEXTS, tokenizer, 3, 12)
    collect_moments(model, sites, [("ffn", 0)], rows, pad_id=0, tokens_per_batch=64, device=torch.device("cpu"))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


KEY = MomentKey("model", "tokenizer", "corpus", 10, 20)


def test_round_trip(tmp_path):
    moment = torch.eye(4, dtype=torch.float64)
    store = MomentStore(tmp_path)
    store.save(("ffn", 3), moment, 99, KEY)
    assert torch.equal(store.load(("ffn", 3), "model", 4), moment.float())


@pytest.mark.parametrize(
    ("place", "model", "width", "message"),
    [
        (("ffn", 3), "another", 4, "another model: expected another, found model"),
        (("ffn", 3), "model", 5, "expected width 5, found shape"),
        (("ffn", 4), "model", 4, "another layer: expected 4, found 3"),
        (("attn", 3), "model", 4, "another site: expected attn, found ffn"),
    ],
)
def test_moments_of_something_else_are_refused(tmp_path, place, model, width, message):
    store = MomentStore(tmp_path)
    store.save(("ffn", 3), torch.eye(4), 99, KEY)
    if place != ("ffn", 3):
        store.path(("ffn", 3)).rename(store.path(place))
    with pytest.raises(MomentError, match=message):
        store.load(place, model, width)


def test_a_broken_or_missing_file_is_said(tmp_path):
    store = MomentStore(tmp_path)
    with pytest.raises(FileNotFoundError, match="stats"):
        store.load(("ffn", 0), "model", 4)
    store.path(("ffn", 0)).write_bytes(b"nonsense")
    with pytest.raises(MomentError, match="unreadable"):
        store.load(("ffn", 0), "model", 4)


def test_the_key_depends_on_everything():
    keys = [KEY, *(MomentKey(**{**vars(KEY), name: value}) for name, value in
                   {"model": "x", "tokenizer": "x", "corpus": "x", "samples": 11, "length": 21}.items())]  # fmt: skip
    assert len({key.folder() for key in keys}) == len(keys)


def test_corpora(tmp_path, loaded):
    path = tmp_path / "corpus.txt"
    path.write_text("one\n\n two \n", encoding="utf-8")
    assert list(corpus_texts(str(path))) == ["one", "two"]
    first = corpus_fingerprint(str(path))
    path.write_text("one\n\n three \n", encoding="utf-8")
    assert corpus_fingerprint(str(path)) != first
    with pytest.raises(MomentError, match="no text"):
        corpus_rows([], loaded[2], 10, 10)
    with pytest.raises(FileNotFoundError, match=r"--moments\.corpus"):
        list(corpus_texts("nobody/no-such-corpus"))


def test_width_is_that_of_the_keys(loaded):
    assert in_features(loaded[1].module("ffn", 0)) == 4 * 32
