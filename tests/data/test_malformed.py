"""Many malformed inputs, each refused with its place; many odd but good ones, read as their clean form is."""

from __future__ import annotations

import time

import pytest

from pmet_lightning import EditDataModule
from pmet_lightning.utils.errors import PmetError
from tests.malformed import KINDS, malformed

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
