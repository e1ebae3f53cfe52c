"""The notebooks run from a clean state and show what is stored in them."""

from __future__ import annotations

import json
import re

import nbformat
import pytest

from notebooks.execute import executed
from tests.conftest import ROOT

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def text_of(output):
    return output.get("text") or str(output.get("data"))


def words(output):
    """What an output says, with numbers as #; a figure's words."""
    drawing = output.get("data", {}).get("image/svg+xml")
    if drawing is not None:
        return sorted(set(re.findall(r"<text[^>]*>([^<]*[a-zA-Z][^<]*)</text>", drawing)))
    return re.sub(" +", " ", NUMBER.sub("#", text_of(output)))


def tolerance(number, beside_intervals):
    """How far a number may be off on another machine, where rounding may turn a fact or an answer in the end.

    Counts below ten, such as layers, have to be the same. Scores in per cent have one decimal and intervals: one answer
    of ten makes 10 points. Everything else may differ by a fifth, or two of its last digit.
    """
    decimals = len(number.partition(".")[2])
    if decimals == 1 and beside_intervals:
        return 10.0
    if decimals == 0 and abs(float(number)) < 10:
        return 0.0
    return max(0.2 * abs(float(number)), 2 * 10.0**-decimals)


def differences(output, stored):
    """What an output says that is not what is stored: words, or numbers beyond their tolerance."""
    if words(output) != words(stored):
        return [(words(output), words(stored))]
    if "image/svg+xml" in stored.get("data", {}):
        return []
    text = text_of(stored)
    pairs = zip(NUMBER.findall(text_of(output)), NUMBER.findall(text), strict=True)
    return [(new, old) for new, old in pairs if abs(float(new) - float(old)) > tolerance(old, "[" in text) + 1e-9]


def outputs(notebook):
    """What each code cell shows."""
    return [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_all():
    assert [path.stem for path in NOTEBOOKS] == [
        "1_edit_a_model",
        "2_the_papers_figures",
        "3_where_does_a_fact_live",
        "4_several_gpus_and_large_models",
    ]


def test_of_a_figure_its_words_are_compared():
    """Neither lines nor numbers, which differ between machines."""
    output = {"data": {"image/svg+xml": '<svg><path d="M 0 1"/><text x="1">layer</text><text>−0.5</text></svg>'}}
    assert words(output) == ["layer"]
    assert words({"text": "Score 95.0 [-1.0, 2.0]\n   2"}) == "Score # [#, #]\n #"


@pytest.mark.parametrize(
    ("stored", "new", "different"),
    [
        ("Score 97.3 [94.4, 99.3]", "Score 95.1 [90.0, 98.3]", []),
        ("Score 97.3 [94.4, 99.3]", "Score 20.0 [15.0, 25.0]", [("20.0", "97.3"), ("15.0", "94.4"), ("25.0", "99.3")]),
        ("to PMET -6.1 [-9.6, -3.0]", "to PMET 6.1 [-9.6, -3.0]", [("6.1", "-6.1")]),
        ("effect 0.088 [0.069, 0.105]", "effect 0.090 [0.070, 0.106]", []),
        ("effect 0.088 [0.069, 0.105]", "effect 0.138 [0.069, 0.105]", [("0.138", "0.088")]),
        ("C of a layer 1.1 GB", "C of a layer 1.6 GB", [("1.6", "1.1")]),
        ("kl 0.00012", "kl 0.00019", [("0.00019", "0.00012")]),
        ("39 of 40 facts", "38 of 40 facts", []),
        ("39 of 40 facts", "12 of 40 facts", [("12", "39")]),
        ("layers [0, 1, 2]", "layers [0, 1, 3]", [("3", "2")]),
        ("layers [0, 1, 2]", "layers [0, 1]", [("layers [#, #]", "layers [#, #, #]")]),
    ],
)
def test_numbers_may_differ_a_little(stored, new, different):
    assert differences({"text": new}, {"text": stored}) == different


def _displayed(cell):
    """Its figures."""
    return [output for output in cell.get("outputs", []) if "data" in output]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_plain(path):
    """Every cell that shows something has its output, without times, counts, errors or paths of a machine."""
    notebook = nbformat.read(path, as_version=4)
    assert set(notebook.metadata) == {"kernelspec"}
    assert any(cell.get("outputs") for cell in notebook.cells)
    for cell in notebook.cells:
        assert cell.metadata == {}
        if cell.cell_type == "code":
            assert cell.execution_count is None
            assert bool(re.search(r"\b(print|display)\(", cell.source)) == bool(cell.outputs), cell.source
            assert cell.source.count("display(") == sum("data" in output for output in cell.outputs), cell.source
    for drawing in (output["data"]["image/svg+xml"] for cell in notebook.cells for output in _displayed(cell)):
        assert len(drawing) <= 60_000
        assert words({"data": {"image/svg+xml": drawing}})
    text = json.dumps(notebook.cells)
    assert not re.search(r"/(home|root|tmp|Users)/|stderr|traceback", text)
    assert str(ROOT.parent) not in text


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_run_and_show_what_is_stored(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = executed(path, tmp_path)
    for new, stored in zip(outputs(notebook), outputs(nbformat.read(path, as_version=4)), strict=True):
        assert len(new) == len(stored)
        assert [differences(*pair) for pair in zip(new, stored, strict=True)] == [[]] * len(stored)
