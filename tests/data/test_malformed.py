"""Many malformed inputs, each refused with its place; many odd but good ones, read as their clean form is."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from pmet_lightning import EditDataModule
from pmet_lightning.data.readers import as_edits, read_edits
from pmet_lightning.utils.errors import PmetError
from tests.malformed import KINDS, malformed
from tests.odd_inputs import odd_inputs

INPUTS = list(malformed(250))
SECONDS = 5  # for a message, without a model


def test_there_are_enough_kinds():
    assert len({bad.kind for bad in INPUTS}) == len(KINDS) >= 40


def check_told(error: BaseException, file: str, where: str) -> None:
    """A message of our own that names the file and the place in it."""
    told = str(error)
    assert isinstance(error, (PmetError, FileNotFoundError)), f"{type(error).__name__}: {told}"
    assert file in told, told
    assert where in told, told
    assert len(told) < 2000, f"{len(told)} characters: {told[:2000]}"


@pytest.mark.parametrize("number", range(len(INPUTS)), ids=lambda i: f"{i}-{INPUTS[i].kind}")
def test_a_malformed_input_is_refused_with_its_place(number, tmp_path):
    bad = INPUTS[number]
    path = bad.write(tmp_path)
    start = time.monotonic()
    with pytest.raises(Exception) as caught:  # noqa: PT011
        EditDataModule(str(path), tokenizer="atlas").setup("fit")
    assert time.monotonic() - start < SECONDS
    check_told(caught.value, bad.file, bad.where)


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
