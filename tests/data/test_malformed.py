"""Many malformed inputs, each refused with its place; many odd but good ones, read as their clean form is."""

from __future__ import annotations

import sys
import time
from dataclasses import replace

import pytest
import transformers

from pmet_lightning import EditDataModule
from pmet_lightning.__main__ import main as program
from pmet_lightning.cli.dispatch import main
from pmet_lightning.data.corpus import CorpusError, corpus_texts
from pmet_lightning.data.readers import as_edits, read_edits
from pmet_lightning.run.options import UsageError
from pmet_lightning.utils.errors import PmetError
from tests.conftest import mostly_slow
from tests.malformed import CONFIGURATIONS, CORPORA, KINDS, malformed
from tests.odd_inputs import odd_inputs

INPUTS = list(malformed(250))
SECONDS = 5  # for a message, without a model


# Every fourth in the default tier; the whole set takes twenty seconds.
SOME_AT_ONCE = [pytest.param(i, marks=pytest.mark.slow if i % 4 else ()) for i in range(len(INPUTS))]


def test_there_are_enough_kinds():
    assert len({bad.kind for bad in INPUTS}) == len(KINDS) >= 40


def check_told(error: BaseException, file: str, where: str) -> None:
    """A message of our own that names the file and the place in it."""
    told = str(error)
    assert isinstance(error, (PmetError, FileNotFoundError)), f"{type(error).__name__}: {told}"
    assert file in told, told
    assert where in told, told
    assert len(told) < 2000, f"{len(told)} characters: {told[:2000]}"


@pytest.mark.parametrize("number", SOME_AT_ONCE, ids=lambda i: f"{i}-{INPUTS[i].kind}")
def test_a_malformed_input_is_refused_with_its_place(number, tmp_path):
    bad = INPUTS[number]
    path = bad.write(tmp_path)
    start = time.monotonic()
    with pytest.raises(Exception) as caught:  # noqa: PT011
        EditDataModule(str(path), tokenizer="atlas").setup("fit")
    assert time.monotonic() - start < SECONDS
    check_told(caught.value, bad.file, bad.where)


# `datasets` waits for five seconds after each table.
QUICK_CORPORA = [kind for kind, (file, *_) in CORPORA.items() if not file.endswith(".parquet")]


@pytest.mark.parametrize("kind", mostly_slow(CORPORA, QUICK_CORPORA))
def test_a_malformed_corpus_is_refused_with_its_place(kind, tmp_path):
    file, content, where = CORPORA[kind]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(CorpusError) as caught:
        list(corpus_texts(str(tmp_path / file)))
    check_told(caught.value, file, where)


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_a_malformed_configuration_is_refused_with_its_place(kind, tmp_path):
    content, where = CONFIGURATIONS[kind]
    (tmp_path / "my.yaml").write_bytes(content)
    with pytest.raises(UsageError) as caught:
        main(["fit", "--config", str(tmp_path / "my.yaml"), "--data.path", "atlas-records"])
    check_told(caught.value, "my.yaml", where)


@pytest.mark.parametrize("number", range(5, len(INPUTS), 50), ids=lambda i: INPUTS[i].kind)
def test_the_program_tells_it_in_one_message(number, tmp_path, monkeypatch, caplog):
    """Exit code 2, no traceback, and no model."""
    bad = INPUTS[number]
    arguments = [
        "fit", "--config", "pmet.yaml", "--data.path", str(bad.write(tmp_path)), "--model.model_name", "atlas",
        "--trainer.run_dir", str(tmp_path / "run"), "--trainer.accelerator", "cpu",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["pmet-lightning", *arguments])
    monkeypatch.setattr(
        transformers.PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("it loads a model")
    )
    with pytest.raises(SystemExit) as caught:
        program()
    assert caught.value.code == 2
    (told,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert told.exc_info is None
    assert bad.file in told.message
    assert bad.where in told.message


ODD = list(odd_inputs())


def test_there_are_enough_odd_inputs():
    assert len(ODD) >= 100


@pytest.mark.parametrize("number", range(len(ODD)), ids=lambda i: f"{i}-{ODD[i].kind}-{ODD[i].file}")
def test_an_odd_input_gives_the_edits_of_its_clean_form(number, tmp_path):
    odd = ODD[number]
    given = odd.given(tmp_path)
    edits = read_edits(given) if odd.file else as_edits(given)
    clean = as_edits(odd.clean)
    assert [replace(edit, origin="") for edit in edits] == [replace(edit, origin="") for edit in clean]
