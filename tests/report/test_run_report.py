"""The report of a run: one page of its own, with the right numbers in it, whatever is missing."""

from __future__ import annotations

import ast
import copy
import json
import math
import random
import re
import warnings
from collections import Counter
from fractions import Fraction
from html.parser import HTMLParser
from xml.etree import ElementTree

import matplotlib as mpl
import pytest
from markupsafe import Markup
from matplotlib.backends.backend_agg import FigureCanvasAgg

from pmet_lightning.report import run_report as report
from pmet_lightning.report.captions import captions
from pmet_lightning.report.figures import MOST_BATCHES, figures
from pmet_lightning.report.run_report import write_report

CORE = ("efficacy", "generalisation", "specificity")
SECTIONS = {"scores", "measures", "targets", "layers", "relations", "forgetting", "worst", "settings", "versions"}
FIGURES = {
    *("loss", "probability", "steps", "stop_reasons", "residual", "norms"),
    *("relations_efficacy", "relations_specificity", *(f"forgetting_{name}" for name in (*CORE, "score"))),
}
CAPTIONS = {"targets", "steps", "residual", "norms", "relations", "forgetting"}
HOSTILE = "<b>&\"'</b><script>alert(1)</script>--><!-- ]]> $x_$ {{ 7 * 7 }}"


def score_table(value: float) -> dict[str, float]:
    table = {"count": 60.0}
    for name in (
        *CORE,
        "score",
        "portability",
        "efficacy_contains",
        "efficacy_exact",
        "efficacy_gap",
        "specificity_kept",
    ):
        table |= {name: value, f"{name}_low": value - 1.5, f"{name}_high": value + 1.25}
    return table | {"efficacy_accuracy": value, "efficacy_magnitude": value, "fluency": 600.0, "perplexity": 5.125}


def full_data(count: int = 60) -> dict:
    """Sixty edits in two edit batches."""
    rng = random.Random(0)
    edits = [
        {
            "case_id": str(i), "edit_batch": i % 2, "question": f"Question {i} is", "target": f"new {i}",
            "target_true": f"old {i}", "relation": f"P{i % 3}", "steps": rng.randint(1, 30),
            "stop_reason": rng.choice(["loss", "argmax", "steps", "hand"]), "p_after": rng.random(),
            "residual_left": rng.choice([0.2, 0.4, 0.6]), "answer": f" new {i}.\nAnd",
            "before": dict.fromkeys(CORE, 0.0),
            "after": {name: rng.choice([0.0, 50.0, 100.0]) for name in CORE},
        }
        for i in range(count)
    ]  # fmt: skip
    active = [8, 5, 2, 7, 3]
    return {
        "title": "a run", "model": "atlas", "records": "atlas-records", "edits_count": count, "seed": 0,
        "created": "2026-11-23 12:00", "seconds": 50.1,
        "scores": {"before": score_table(12.0), "after": score_table(92.0) | {"kl": 0.0213}},
        "edit_batches": [
            {"edit_batch": i, "at_once": score_table(95.0 - i), "at_the_end": score_table(90.0 - i)} for i in (0, 1)
        ],
        "curves": {
            "step": [0, 1, 2, 0, 1], "loss": [5.0, 1.0, 0.1, 4.0, 0.5], "loss_nll": [4.0, 0.9, 0.1, 3.0, 0.4],
            "loss_kl": [0.0, 0.1, 0.2, 0.0, 0.1], "loss_norm": [0.0] * 5, "p": [0.1, 0.5, 0.9, 0.2, 0.8],
            "active_edits": active,
        },
        "layers": [
            {"edit_batch": b, "site": "ffn", "layer": layer, "residual": 1 - 0.2 * layer - 0.01 * b,
             "norm_ratio": 0.05 + 0.01 * layer + 0.001 * b, "solve_error": 1e-12, "kept": 1.0}
            for b in (0, 1) for layer in (0, 1, 2)
        ],
        "edits": edits,
        "relations": [
            {"relation": f"P{i}", "count": 10 + i, "before": dict.fromkeys(CORE, 5.0 * i),
             "after": dict.fromkeys(CORE, 90.0 + i)} for i in range(3)
        ],
        "settings": {"model": {"layers": [0, 1, 2], "optimizer": {"lr": 0.5}}, "data": {"limit": None}},
        "versions": {"torch": "2.13.0"},
    }  # fmt: skip


class Page(HTMLParser):
    """What a browser would see: tags, ids, the rows of each section's tables, text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.rows: dict[str, list[list[str]]] = {}
        self.text, self.section, self.in_cell = "", "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]
        if tag == "section":
            self.section = dict(attrs)["id"]
        if tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        if tag in ("td", "th"):
            self.rows[self.section][-1].append("")
            self.in_cell = True

    def handle_data(self, data):
        self.text += data
        if self.in_cell:
            self.rows[self.section][-1][-1] += data

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The page of the full data; drawing one takes a second."""
    return write_report(full_data(), tmp_path_factory.mktemp("full") / "new")


@pytest.fixture
def undrawn(monkeypatch):
    """For tests that do not look at the drawings."""
    monkeypatch.setattr(report, "svg", lambda figure, name: Markup("<svg></svg>"))


def page_of(data: dict, folder) -> Page:
    return Page(write_report(data, folder).read_text(encoding="utf-8"))


def line(axes, label: str) -> tuple[list[float], list[float]]:
    """Points of the line with a label, without gaps."""
    [found] = [one for one in axes.lines if one.get_label() == label]
    points = [(float(x), float(y)) for x, y in zip(*found.get_data(), strict=True) if not math.isnan(y)]
    return [x for x, _ in points], [y for _, y in points]


def test_a_full_data_set_gives_every_part_on_one_page(full):
    text = full.read_text(encoding="utf-8")
    page = Page(text)
    assert {file.name for file in full.parent.iterdir()} == {"report.html", "report.json"}
    assert full.name == "report.html"
    assert set(page.ids) >= SECTIONS
    assert page.tags["svg"] == len(FIGURES)
    assert page.tags["figcaption"] == len(CAPTIONS)
    for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(drawing)


def test_nothing_is_fetched_and_nothing_is_run(full):
    text = full.read_text(encoding="utf-8")
    assert not re.search("https?://", re.sub(r'xmlns(:\w+)?="[^"]*"', "", text))
    page = Page(text)
    assert page.tags["script"] == page.tags["img"] == page.tags["iframe"] == 0
    links = {value for name, value in page.attributes if name in ("src", "href", "xlink:href")}
    assert {link for link in links if not link.startswith("#")} == {"data:,", "report.json"}


def test_every_reference_in_a_drawing_has_its_own_target(full):
    """Six drawings on one page must not attach each other's clip paths."""
    page = Page(full.read_text(encoding="utf-8"))
    used = {value[1:] for name, value in page.attributes if name == "xlink:href"}
    used |= {value[5:-1] for name, value in page.attributes if name == "clip-path"}
    assert used
    assert all(page.ids.count(name) == 1 for name in used)


def test_scores_stand_with_their_intervals(full):
    page = Page(full.read_text(encoding="utf-8"))
    head, unedited, edited = page.rows["scores"]
    assert [cell.strip() for cell in head] == ["", *CORE, "Score"]
    assert [cell.strip() for cell in unedited] == ["unedited"] + ["12.010.5 to 13.2"] * 4
    assert [cell.strip() for cell in edited] == ["edited"] + ["92.090.5 to 93.2"] * 4
    measures = {row[0]: [cell.split(" ")[0] for cell in row[1:]] for row in page.rows["measures"] if len(row) == 3}
    assert measures["efficacy, contains"] == ["12.0", "92.0"]
    assert measures["specificity, kept"] == ["12.0", "92.0"]
    assert measures["perplexity"] == ["5.12", "5.12"]
    assert measures["KL"] == ["–", "0.0213"]
    assert "fluency" in measures
    assert "multihop" not in measures


def test_hostile_text_stays_text(tmp_path, full):
    data = full_data(4)
    for edit in data["edits"]:
        edit |= {"question": HOSTILE, "target": HOSTILE, "answer": HOSTILE, "relation": HOSTILE, "stop_reason": HOSTILE}
    data |= {"title": HOSTILE, "model": HOSTILE, "settings": {HOSTILE: {"x": HOSTILE}}, "versions": {HOSTILE: HOSTILE}}
    for row in (*data["relations"], *data["layers"]):
        row |= {"relation": HOSTILE, "site": HOSTILE}
    text = write_report(data, tmp_path).read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags["b"] == page.tags["script"] == 0
    assert set(page.tags) == set(Page(full.read_text(encoding="utf-8")).tags)
    assert page.rows["worst"][1][:2] == [HOSTILE, HOSTILE]
    assert page.rows["settings"][0][0] == f"{HOSTILE}.x"
    for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(drawing)


def test_any_script_can_be_drawn(tmp_path):
    rows = [row | {"relation": "母语 $5 to $6"} for row in full_data()["relations"]]
    data = {"relations": rows, "edits": [{"question": "broken \ud800 text"}]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = write_report(data, tmp_path).read_text(encoding="utf-8")
    assert "母语 $5 to $6 (10)" in text


ALONE = {  # the sections and the figures of each part
    "scores": {"scores", "measures"}, "layers": {"layers", "residual", "norms"},
    "edit_batches": {"forgetting", *(f"forgetting_{name}" for name in (*CORE, "score"))},
    "edits": {"worst", "targets", "steps", "stop_reasons"}, "curves": {"targets", "loss", "probability"},
    "relations": {"relations", "relations_efficacy", "relations_specificity"},
    "settings": {"settings"}, "versions": {"versions"}, "title": set(), "model": set(), "seconds": set(),
}  # fmt: skip


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("how", ["missing", "None", "empty"])
def test_what_is_missing_is_left_out(tmp_path, undrawn, name, how):
    data = full_data(6)
    gone = {"missing": {}, "None": dict.fromkeys(data), "empty": {key: type(data[key])() for key in data}}[how]
    alone = gone | {name: data[name]}
    page = page_of(alone, tmp_path)
    drawn = set(figures(alone))
    assert (SECTIONS & set(page.ids)) | drawn == ALONE[name]
    assert page.tags["svg"] == len(drawn)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"title": "only a title"},
        {"scores": {"before": None, "after": {"count": 3}}},
        {"scores": {"after": {"efficacy": 50.0}}},
        {"curves": {"loss": [math.nan, None]}, "layers": [{}], "relations": [{"relation": None}], "edits": [{}]},
        {"curves": {"loss": [1.0]}, "layers": [{"layer": 3, "norm_ratio": 0.1}], "edits": [{"question": "Q"}]},
        {
            "edit_batches": [{"at_once": {"efficacy": 1.0}}, {"at_the_end": None}],
            "edits": [{"after": None, "steps": 3}],
        },
        {"relations": [{"relation": "P1", "after": {"efficacy": 3.0}}], "edits": [{"stop_reason": "loss"}]},
    ],
)
def test_almost_nothing_is_enough(tmp_path, undrawn, data):
    before = copy.deepcopy(data)
    page = page_of(data, tmp_path)
    assert page.tags["h1"] == 1
    assert "None" not in page.text
    assert repr(data) == repr(before)


def test_the_numbers_are_kept_as_json(tmp_path, undrawn):
    data = full_data()
    write_report(data, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == data
    data["curves"]["loss"][1] = math.nan
    data["scores"]["after"]["kl"] = math.inf
    data["edits"][0]["residual_left"] = math.nan
    page = page_of(data, tmp_path)
    kept = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert kept["curves"]["loss"][1] is kept["scores"]["after"]["kl"] is kept["edits"][0]["residual_left"] is None
    assert not [row for row in page.rows["measures"] if row[0] == "KL"]


def test_the_worst_twenty_edits(tmp_path, undrawn):
    data = full_data()
    for i in range(0, 60, 7):  # evaluated in part, or not at all
        data["edits"][i]["after"]["generalisation"] = None if i % 2 else math.nan
    data["edits"][3]["after"] = None
    data["edits"][5]["residual_left"] = None
    rows = page_of(data, tmp_path).rows["worst"][1:]

    left, expected = list(data["edits"]), []
    while len(expected) < 20:
        worst = left[0]
        for edit in left[1:]:
            if slow_order(edit) < slow_order(worst):
                worst = edit
        left.remove(worst)
        expected.append(worst)
    assert [row[0] for row in rows] == [edit["question"] for edit in expected]
    assert [row[3] for row in rows] == [edit["answer"].strip() for edit in expected]
    assert [row[4] for row in rows] == [f"{edit['p_after']:.3f}" for edit in expected]


def slow_order(edit: dict) -> tuple[Fraction, Fraction]:
    known = [Fraction(v) for v in (edit["after"] or {}).values() if v is not None and not math.isnan(v)]
    left = edit["residual_left"]
    return sum(known) / len(known) if known else Fraction(10**6), -Fraction(-1 if left is None else left)


def test_bars_of_steps_and_stop_reasons():
    data = full_data()
    drawn = figures(data)
    (left,), (right,) = drawn["steps"].axes, drawn["stop_reasons"].axes
    reasons = Counter(edit["stop_reason"] for edit in data["edits"])
    names = {"loss low enough": "loss", "target is first choice": "argmax", "out of steps": "steps", "hand": "hand"}
    labels = [label.get_text() for label in right.get_yticklabels()]
    assert {names[label]: bar.get_width() for label, bar in zip(labels, right.patches, strict=True)} == reasons
    heights: Counter[int] = Counter()
    for bar in left.patches:
        assert bar.get_y() == heights[round(bar.get_x() + bar.get_width() / 2)], "they stand on one another"
        heights[round(bar.get_x() + bar.get_width() / 2)] += bar.get_height()
    assert heights == Counter(edit["steps"] for edit in data["edits"])


def test_every_edit_batch_has_a_curve_and_the_active_edits_are_added_up():
    data = full_data()
    drawn = figures(data)
    loss, active = drawn["loss"].axes
    (p,) = drawn["probability"].axes
    for axes, name in ((loss, "loss"), (p, "p")):
        values = data["curves"][name]
        assert line(axes, "edit batch 0") == ([0, 1, 2], values[:3])
        assert line(axes, "edit batch 1") == ([0, 1], values[3:])
        assert len(axes.lines) == 2, "no parts of the loss of several edit batches"
    (area,) = active.collections
    assert {y for _, y in area.get_paths()[0].vertices} == {8 + 7, 5 + 3, 2, 0}


def test_of_many_edit_batches_some_have_a_curve_from_the_first_to_the_last():
    points = {"step": [0, 1] * 30, "loss": [float(i) for i in range(1, 61)], "active_edits": [1] * 60}
    axes, _ = figures({"curves": points})["loss"].axes
    assert len(axes.lines) == MOST_BATCHES
    assert line(axes, "edit batch 0")[1] == [1, 2]
    assert line(axes, "edit batch 29")[1] == [59, 60]
    assert "a line for each of 8 of the 30 edit batches" in captions({"curves": points})["targets"]


def one_batch(**more) -> dict:
    curves = {"step": [0, 1, 2], "loss": [5.0, 1.0, 0.2], "loss_nll": [5.0, 1.0, 0.2], "p": [0.1, 0.5, 0.9]}
    bands = {f"{name}_{level}": [value] * 3 for name in ("loss", "p") for level, value in (("q25", 0.1), ("q75", 0.9))}
    return {"curves": curves | bands | {"active_edits": [8, 5, 2], "loss_kl": [0.0] * 3} | more}


def test_a_single_edit_batch_has_the_band_of_the_middle_half_and_no_curve_twice():
    drawn = figures(one_batch())
    loss, _ = drawn["loss"].axes
    assert [one.get_label() for one in loss.lines] == ["mean"], "all of the loss is its only part"
    assert len(loss.collections) == len(drawn["probability"].axes[0].collections) == 1
    drawn = figures(one_batch(loss_kl=[0.1, 0.2, 0.1]))
    assert [one.get_label() for one in drawn["loss"].axes[0].lines] == ["mean", "nll", "kl"]


def test_a_baseline_has_epochs_and_no_active_edits(tmp_path):
    data = {"curves": {"step": [0.0, 1.0], "loss": [3.0, 1.0], "p": [0.1, 0.6]}}
    (axes,) = figures(data)["loss"].axes
    assert axes.get_xlabel() == "epoch"
    text = page_of(data, tmp_path).text
    assert "Training the weight" in text
    assert "From the first to the last epoch the loss went from 3.00 to 1.00" in text
    assert "search" not in text


def test_edits_that_all_took_as_many_steps_are_one_bar_among_others():
    edits = [{"stop_reason": "steps", "steps": 30}] * 4
    (axes,) = figures({"edits": edits})["steps"].axes
    assert axes.get_xlim() == (0, 31)


def test_layers_show_residuals_and_norms():
    data = full_data()
    drawn = figures(data)
    for batch in (0, 1):
        rows = [row for row in data["layers"] if row["edit_batch"] == batch]
        left = [edit["residual_left"] for edit in data["edits"] if edit["edit_batch"] == batch]
        residuals = [*(row["residual"] for row in rows), sum(left) / len(left)]
        assert line(drawn["residual"].axes[0], f"ffn, edit batch {batch}")[1] == pytest.approx(residuals)
        assert line(drawn["norms"].axes[0], f"ffn, edit batch {batch}")[1] == [row["norm_ratio"] for row in rows]
    assert [label.get_text() for label in drawn["residual"].axes[0].get_xticklabels()] == ["0", "1", "2", "end"]


def test_relations_and_forgetting_show_both_times():
    data = full_data()
    drawn = figures(data)
    rows = sorted(data["relations"], key=lambda row: row["count"], reverse=True)
    for name in ("efficacy", "specificity"):
        (axes,) = drawn[f"relations_{name}"].axes
        for phase in ("before", "after"):
            assert line(axes, phase) == ([row[phase][name] for row in rows], [0, 1, 2])
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert labels == ["P2 (12)", "P1 (11)", "P0 (10)"]
    for name in (*CORE, "score"):
        (axes,) = drawn[f"forgetting_{name}"].axes
        for label, phase in (("right after writing", "at_once"), ("at the end", "at_the_end")):
            assert line(axes, label) == ([0, 1], [batch[phase][name] for batch in data["edit_batches"]])
    once = figures(data | {"edit_batches": data["edit_batches"][:1]})
    assert not [name for name in once if name.startswith("forgetting")]


def test_many_relations_layers_and_batches_are_drawn():
    data = full_data()
    data["relations"] = [{"relation": f"P{i}", "count": i, "after": {"efficacy": 50.0}} for i in range(200)]
    data["layers"] = [
        {"edit_batch": b, "site": site, "layer": layer, "residual": 0.5} for b in range(9) for site in ("attn", "ffn")
        for layer in range(40)
    ]  # fmt: skip
    drawn = figures(data)
    assert len(drawn["relations_efficacy"].axes[0].get_yticks()) == report.MOST_RELATIONS
    assert line(drawn["relations_efficacy"].axes[0], "after")[1] == list(range(30))
    assert len(drawn["residual"].axes[0].get_xticks()) <= 20
    assert len(drawn["residual"].axes[0].get_legend().get_texts()) == 4, "of each site the first and the last"
    assert "norms" not in drawn


def test_figures_can_go_to_tensorboard_and_leave_matplotlib_as_it_was():
    before = dict(mpl.rcParams)
    drawn = figures(full_data())
    assert set(drawn) == FIGURES
    for figure in drawn.values():
        FigureCanvasAgg(figure).draw()
    assert dict(mpl.rcParams) == before


def test_the_same_data_give_the_same_bytes(tmp_path, full):
    again = write_report(full_data(), tmp_path)
    assert again.read_bytes() == full.read_bytes()
    assert (tmp_path / "report.json").read_bytes() == (full.parent / "report.json").read_bytes()


def test_a_run_does_not_start_slower_for_its_report():
    with open(report.__file__, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    imported = [ast.unparse(node) for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert imported
    assert not [statement for statement in imported if "matplotlib" in statement or "jinja2" in statement]


def test_captions_say_what_the_figures_show():
    data = full_data()
    told = captions(data)
    assert set(told) == CAPTIONS
    assert "the loss went from 4.53 to 0.29 and P(target) went from 0.15 to 0.85" in told["targets"]  # weighed 8 to 7
    reasons = Counter(edit["stop_reason"] for edit in data["edits"])
    for count in reasons.values():
        assert re.search(rf"\b{count} (stopped|ran)", told["steps"])
    left = sum(edit["residual_left"] for edit in data["edits"]) / len(data["edits"])
    assert f"{100 * left:.0f} % of the change is missing" in told["residual"]
    assert "largest update, in layer 2 in edit batch 1, is 0.071 times" in told["norms"]
    assert "not measured" in told["norms"]
    assert told["relations"] == "Efficacy is lowest, 90, for P0. Specificity is lowest, 90, for P0."
    assert "97" not in told["forgetting"]


@pytest.mark.parametrize(
    ("damage", "factor", "said"), [("none", 1.03, "No size is too large in itself"), ("damaged", 6.2, "too much")]
)
def test_whether_an_update_is_too_large_is_judged_by_what_became_of_other_text(damage, factor, said):
    """Atlas' updates are many times their weights, and do no harm: the caption must not call that bad, nor good."""
    rows = [{"edit_batch": 0, "site": "ffn", "layer": i, "norm_ratio": ratio} for i, ratio in enumerate((4.7, 21, 22))]
    told = captions({"layers": rows, "verdict": {"damage": damage, "perplexity_factor": factor}})["norms"]
    assert "in layer 2, is 22 times" in told
    assert "in layer 0, 4.7 times" in told
    assert said in told
    assert f"× {factor}" in told


def test_a_residual_that_stays_is_not_called_falling():
    def data(before_last, left):
        rows = [{"site": "ffn", "layer": i, "residual": value} for i, value in enumerate((1.0, before_last))]
        return {"layers": rows, "edits": [{"residual_left": left}] * 4}

    assert "hardly show here" in captions(data(0.95, 0.1))["residual"]
    assert "hardly show here" not in captions(data(0.4, 0.1))["residual"]
    assert "smaller λ" in captions(data(0.95, 0.9))["residual"]


def test_a_remedy_is_only_told_where_many_edits_need_it():
    def told(out_of_steps):
        reasons = ["steps"] * out_of_steps + ["argmax"] * (20 - out_of_steps)
        return captions({"edits": [{"stop_reason": reason} for reason in reasons]})["steps"]

    assert "More steps" in told(5)
    assert "More steps" not in told(1)


def test_nothing_is_cut_off(full):
    """Tables scroll in their own box, and every column has its name beside the value where a table becomes cards."""
    text = full.read_text(encoding="utf-8")
    for table in re.finditer(r'<table class="([^"]*)">(.*?)</table>', text, re.DOTALL):
        scrolls = text[: table.start()].rstrip().endswith('<div class="wide">')
        assert scrolls or "names" in table[1], table[1]
        if "cards" in table[1].split():
            assert table[2].count("<td") == table[2].count("data-label=") > 0
    for width in re.findall(r'<svg[^>]* width="([\d.]+)pt"', text):
        assert float(width) < 4.7 * 72, "half a page, so that it need not be shrunk on a narrow screen"
