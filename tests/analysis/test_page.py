"""The page of an analysis: everything a reader needs on one page, which fetches nothing."""

from __future__ import annotations

import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch

from pmet_lightning.analysis.captions import captions
from pmet_lightning.analysis.claims import claims_of
from pmet_lightning.analysis.facts import read_facts
from pmet_lightning.analysis.figures import figures
from pmet_lightning.analysis.page import write_analysis_page
from pmet_lightning.analysis.tracing import SUBJECT_LAST
from tests.planted import records, save_planted, study_of, written
from tests.report.test_run_report import HOSTILE, Page

SETTINGS = {"model": {"model_name": HOSTILE, "patch": None}, "data": {"path": "facts.json"}, "top": 50}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Twelve facts, of which each is one of three."""
    folder = tmp_path_factory.mktemp("page")
    study = study_of(save_planted("gpt2", folder / "model", 1, 2))
    study.ask(read_facts(written(folder, records())))
    return study.measure("before")[0].of([0, 1, 2] * 4)


@pytest.fixture(scope="module")
def text(found, tmp_path_factory):
    return page_of(found, tmp_path_factory.mktemp("out"))


def page_of(found, folder) -> str:
    counts = {"read": 15, "used": len(found.questions), "left_out": {"a reason": 3}}
    claims = claims_of(found, None)
    return write_analysis_page(folder, SETTINGS, counts, [found], claims, figures([found])).read_text(encoding="utf-8")


def test_the_page_has_the_finding_the_layers_and_captioned_figures(text):
    page = Page(text)
    assert {"finding", "layers", "figures", "facts", "settings"} <= set(page.ids)
    assert page.tags["svg"] == page.tags["figcaption"] == 5
    assert "Shown (3 of 3 predictions shown)." in page.text
    assert '--model.layers "[1]"' in page.text
    assert "12 of 15 facts from facts.json; 3 left out: a reason" in page.text
    assert [row[-1] for row in page.rows["finding"][1:]] == ["shown"] * 3
    assert len(page.rows["facts"]) == 1 + 12
    assert page.rows["facts"][1][:2] == ["The mother tongue of Danila Morvane is", "Basque"]
    assert "None" not in page.text
    for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(drawing)


def test_captions_say_what_the_figures_show(found, text):
    """The planted model stores in layer 1 and fetches in layer 2, where the answer becomes readable."""
    told = captions(found)
    assert set(told) == {"effect", "tracing", "contribution", "lens"}
    effect = found.measures["effect"]
    ffn = effect.at(component="ffn", place=SUBJECT_LAST).nanmean(dim=0)
    assert f"FFN's effect is largest in layer 1 ({float(ffn[1]):.3f})" in told["effect"]
    assert "attention's is largest in layer 2" in told["effect"]
    assert told["tracing"].endswith("prompt's last token from layer 2 on.")
    for component, words in (("attn", "attention adds {}"), ("ffn", "the FFNs {}")):
        added = found.of_followed("contribution", token="last", component=component).mean(dim=0).sum()
        assert words.format(f"{float(added):.1f}") in told["contribution"]
    assert all(sentence in Page(text).text for sentence in told.values())


def test_a_caption_does_not_call_unreadable_what_is_readable(found):
    def told(subject, last):
        lens = found.measures["lens"]
        values = torch.zeros_like(lens.values)
        axes = list(lens.axes)
        assert axes.index("token") == 0, "a legend for what follows"
        names = list(lens.axes["token"])
        values[:, names.index("subject")], values[:, names.index("last")] = subject, last
        return captions(replace(found, measures=found.measures | {"lens": replace(lens, values=values)}))["lens"]

    assert "not the answer in a form that can be said" in told(0.0, 1.0)
    assert "not the answer in a form that can be said" not in told(0.9, 1.0)
    assert "stays below one half" in told(0.0, 0.2)


def test_it_fetches_nothing_and_names_stay_text(text):
    assert not re.search("https?://", re.sub(r'xmlns(:\w+)?="[^"]*"', "", text))
    page = Page(text)
    assert page.tags["b"] == page.tags["script"] == page.tags["img"] == page.tags["iframe"] == 0
    links = {value for name, value in page.attributes if name in ("src", "href")}
    files = {"analysis.json", "layers.csv", "tracing.csv", "facts.csv"}
    assert {link for link in links if not link.startswith(("#", "data:"))} == files
    assert f"Where {HOSTILE} keeps its facts" in page.text


def test_every_reference_in_a_drawing_has_its_own_target(text):
    page = Page(text)
    used = {value[5:-1] for name, value in page.attributes if name == "clip-path"}
    assert used
    assert all(page.ids.count(name) == 1 for name in used)


def test_without_tracing_the_page_has_neither_its_figures_nor_layers(found, tmp_path):
    measures = {name: measure for name, measure in found.measures.items() if name != "effect"}
    page = Page(page_of(replace(found, measures=measures), tmp_path))
    assert "layers" not in page.ids
    assert page.tags["svg"] == 3
    assert "tracing.csv" not in {value for _, value in page.attributes}


def test_of_few_facts_the_page_shows_no_interval(found, tmp_path):
    text = page_of(found.of([0, 1, 2]), tmp_path)
    page = Page(text)
    assert "Too few facts to say." in page.text
    assert not any(" to " in row[1] for row in page.rows["finding"][1:])
