"""Tokenizers with ids that the model has no embedding for: taken where they do no harm, else refused before work."""

from __future__ import annotations

import pytest

from pmet_lightning import Editor
from pmet_lightning.data.encoder import PromptEncoder, load_tokenizer
from pmet_lightning.data.vocabulary import VocabularyError
from pmet_lightning.model.loading import load_model
from tests.tiny import RECORDS, save_tiny

ROWS = 3000  # of the shipped tokenizer, all of which are used
SETTINGS = {"layers": [0, 1], "corpus": "atlas-corpus", "steps": 3, "free_tokens": 2, "context_count": 1}


@pytest.fixture
def tokenizer():
    return load_tokenizer("atlas")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("model"))


def edited(folder, tokenizer, tmp_path):
    moments = {"folder": str(tmp_path / "moments"), "samples": 50}
    editor = Editor(load_model(folder), tokenizer, moments=moments, **SETTINGS)
    editor.edit(RECORDS[:3])
    return editor


def test_a_padding_token_beyond_the_embedding_is_not_used(folder, tokenizer, tmp_path):
    prompts = ["The river runs to", "Torvik Elmson plays the sport of"]
    expected = edited(folder, load_tokenizer("atlas"), tmp_path).ask(prompts, 4)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == ROWS
    assert edited(folder, tokenizer, tmp_path).ask(prompts, 4) == expected


@pytest.mark.parametrize(("pad", "eos", "expected"), [("[PAD]", None, 0), (None, "[END]", 0), ("Ġthe", None, None)])
def test_the_first_id_that_the_model_knows_is_taken(tokenizer, pad, eos, expected):
    given = {name: token for name, token in (("pad_token", pad), ("eos_token", eos)) if token is not None}
    tokenizer.add_special_tokens(given)
    found = PromptEncoder.of(tokenizer, rows=ROWS).pad_id
    assert found == (tokenizer.pad_token_id if expected is None else expected)
    assert found < ROWS


def test_words_that_were_added_are_refused_before_work(folder, tokenizer, tmp_path):
    tokenizer.add_tokens(["Prilforth", "Zorn"])
    with pytest.raises(VocabularyError, match=r"2 tokens beyond the 3000 embeddings.*'Prilforth' with id 3000.*resize"):
        edited(folder, tokenizer, tmp_path)
    model = load_model(folder)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "resized")
    edited(str(tmp_path / "resized"), tokenizer, tmp_path)


def test_a_special_token_that_every_text_begins_with_is_refused(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer.add_special_tokens({"bos_token": "[START]"})
    PromptEncoder.of(tokenizer, rows=ROWS)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("[START] $A", special_tokens=[("[START]", ROWS)])
    with pytest.raises(VocabularyError, match=r"'\[START\]' with id 3000"):
        PromptEncoder.of(tokenizer, rows=ROWS)


def test_so_is_one_in_a_chat_template(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["[USER]"]})
    tokenizer.chat_template = "{% for m in messages %}{{ '[USER] ' + m['content'] }}{% endfor %}"
    PromptEncoder.of(tokenizer, rows=ROWS)
    with pytest.raises(VocabularyError, match=r"'\[USER\]' with id 3000"):
        PromptEncoder.of(tokenizer, chat=True, rows=ROWS)


def test_a_text_that_holds_one_is_named(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["[IMAGE]"]})
    encoder = PromptEncoder.of(tokenizer, rows=ROWS)
    assert encoder.encode_all(["The river"])
    with pytest.raises(VocabularyError, match=r"'The \[IMAGE\] is' holds a token with id 3000"):
        encoder.encode("The {} is", "[IMAGE]")
