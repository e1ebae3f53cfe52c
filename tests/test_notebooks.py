"""The notebooks run from a clean state and show what is stored in them."""

from __future__ import annotations

import json
import re

import nbformat
import pytest

from notebooks.execute import executed
from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def words(output):
    """What an output says; numbers, which differ between machines in their last digits, as #; a figure's words."""
    drawing = output.get("data", {}).get("image/svg+xml")
    if drawing is not None:
        return sorted(set(re.findall(r"<text[^>]*>([^<]*[a-zA-Z][^<]*)</text>", drawing)))
    return re.sub(" +", " ", re.sub(r"-?[\d.]+", "#", output.get("text") or str(output.get("data"))))


def shown(notebook):
    """What each code cell shows."""
    return [[words(output) for output in cell.get("outputs", [])] for cell in notebook.cells]


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
    home, folder = tmp_path / "home", tmp_path / "here"
    for place in (home, folder):
        place.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert shown(executed(path, folder)) == shown(nbformat.read(path, as_version=4))
