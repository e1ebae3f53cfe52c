"""The command ``analyze``: reading facts, intervals, the proposal, files and errors."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pmet_lightning.analysis.facts import KnownFact, read_facts
from pmet_lightning.analysis.layer_choice import NO_EVIDENCE, layers_to_edit, propose
from pmet_lightning.analysis.measures import TOO_FEW, Measure, resampled_means, summarize
from pmet_lightning.analysis.tracing import POSITIONS, Tracer, default_window
from pmet_lightning.cli.dispatch import main
from pmet_lightning.data.fields import RecordError
from pmet_lightning.data.readers import read_edits
from pmet_lightning.model.fingerprint import fingerprint
from pmet_lightning.model.patch import PatchError, save_patch
from pmet_lightning.solver.weight_delta import WeightDelta
from pmet_lightning.utils.resources import locate
from tests.planted import FACTS, edit_of, records, save_planted, study_of, written


def test_intervals_are_a_plain_bootstrap():
    values = torch.rand(30, 4, generator=torch.Generator().manual_seed(1)) ** 2
    values[:10, 1] = torch.nan
    mean, low, high, count = summarize(values)
    assert count.tolist() == [30, 20, 30, 30]
    picks = torch.randint(30, (2000, 30), generator=torch.Generator().manual_seed(7))
    for i in range(4):
        draws = sorted(float(values[p, i].nanmean()) for p in picks)
        assert float(mean[i]) == pytest.approx(float(values[:, i].nanmean()))
        assert float(low[i]) == pytest.approx(draws[50], abs=0.02)
        assert float(high[i]) == pytest.approx(draws[-50], abs=0.02)
    assert resampled_means(values[:, 0]).shape == (1000,)
    rows = list(Measure(values, {"layer": range(4)}).rows())
    assert [row["layer"] for row in rows] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("ffn", "stream", "layers"),
    [
        ([0.6, 0.1, 0.0, 0.0], [0.7, 0.6, 0.3, 0.4], [0, 1]),
        ([0.1, 0.5, 0.9, 0.1], [0.9, 0.9, 0.8, 0.1], [1, 2]),
        ([0.6, 0.1, 0.9, 0.3], [0.1, 0.1, 0.8, 0.8], [2, 3]),
        ([-0.2, -0.1, -0.3, -0.3], [0.0, 0.0, 0.0, 0.0], [1]),
        ([0.6, 0.04, 0.02, 0.3], [0.7, 0.7, 0.7, 0.7], [0, 1]),  # an idle FFN ends the range
        ([0.1, 0.3, 0.6, 0.31], [0.7, 0.7, 0.7, 0.3], [1, 2]),  # so does a stream that is read already
    ],
)
def test_layers_reach_from_half_of_the_peak_to_an_idle_ffn_or_half_of_the_stream(ffn, stream, layers):
    assert layers_to_edit(torch.tensor(ffn), torch.tensor(stream)) == layers


def test_a_proposal_says_how_sure_it_is():
    generator = torch.Generator().manual_seed(0)

    def noisy(means, spread):
        return torch.tensor(means) + spread * torch.randn(40, 4, generator=generator)

    ffn, stream = noisy([0.0, 0.4, 0.1, 0.0], 0.05), noisy([0.4, 0.4, 0.4, 0.1], 0.05)
    proposal = propose(ffn, stream)
    assert (proposal.layers, proposal.verdict, proposal.same_layers) == ([1, 2], "sure", 1.0)
    assert proposal.effect["mean"] == pytest.approx(float(ffn[:, 1].mean()), abs=1e-6)
    assert proposal.lead["mean"] == pytest.approx(float((ffn[:, 1] - ffn[:, 2]).mean()), abs=1e-6)
    assert (proposal.first, proposal.last) == ((1, 1), (2, 2))
    assert propose(noisy([-0.1] * 4, 0.5), stream).verdict == NO_EVIDENCE
    tie = propose(noisy([0.0, 0.4, 0.1, 0.0], 0.05), noisy([0.4, 0.4, 0.2, 0.0], 0.3))
    assert tie.verdict != "sure"
    assert (tie.same_peak, tie.same_layers < 0.95) == (1.0, True)
    assert tie.first == (1, 1)
    assert tie.last[0] < tie.last[1]


KNOWN = {
    "known_id": 7,
    "subject": "Danila Morvane",
    "attribute": "Basque",
    "template": "The mother tongue of {}",
    "prediction": " Basque, and",
    "prompt": "The mother tongue of Danila Morvane is",
    "relation_id": "P1",
}


def test_known_facts_are_read(tmp_path):
    (fact,) = read_facts(written(tmp_path, [KNOWN]))
    assert fact == KnownFact("7", "The mother tongue of {} is", "Danila Morvane", "Basque", None)
    with pytest.raises(RecordError, match="record 0: no field 'subject'"):
        read_facts(written(tmp_path, [{name: v for name, v in KNOWN.items() if name != "subject"}]))
    (fact,) = read_facts(written(tmp_path, [FACTS[0] | {"target_new": "Lima"}]))
    assert (fact.true, fact.new) == ("Basque", "Lima")


def test_a_known_fact_without_a_prompt_names_its_format(tmp_path):
    (tmp_path / "facts.json").write_text(json.dumps([{"subject": "Ann", "attribute": "Oz"}]))
    with pytest.raises(RecordError, match=r"facts\.json, record 0: no field 'prompt'.* Expected known_facts records"):
        read_facts(str(tmp_path / "facts.json"))


def test_real_known_facts_are_read(shared):
    facts = read_facts(str(shared / "data" / "known_facts_300.json"))
    assert len(facts) == 300
    assert all(fact.prompt.count("{}") == 1 and fact.true and fact.new is None for fact in facts)
    assert facts[0].prompt == "{} is located in the continent of"


@pytest.mark.parametrize(("window", "layers"), [(1, [2]), (2, [2, 3]), (3, [1, 2, 3]), (10, [0, 1, 2, 3])])
def test_a_window_lies_around_its_layer(loaded, window, layers):
    model, sites, _ = loaded("gpt2")
    tracer = Tracer(model, sites, False, window, 0, 100, torch.device("cpu"))
    assert list(tracer.restored_layers("ffn", 2)) == list(tracer.restored_layers("attn", 2)) == layers
    assert list(tracer.restored_layers("hidden", 2)) == [2]


@pytest.mark.parametrize(("depth", "window"), [(1, 1), (4, 1), (8, 1), (12, 2), (18, 3), (28, 5), (48, 10)])
def test_the_default_window_is_the_share_of_ten_of_48_layers(depth, window):
    assert default_window(depth) == window


def test_a_given_window_is_used_and_named(tmp_path):
    folder = save_planted("gpt2", tmp_path / "model", 1, 2)
    assert study_of(folder, window=None).window == 1
    study = study_of(folder, window=2, draws=1)
    study.ask(read_facts(written(tmp_path, records())))
    found, _ = study.measure("before")
    assert found.window == found.of([0]).window == 2
    ffn = found.measures["effect"].at(component="ffn", place="last subject token")
    assert (ffn[:, 0] > 0.3).all()  # layer 1, which stores, is restored with it
    assert (ffn[:, 1] > 0.3).all()


def test_a_record_without_a_true_answer_follows_what_the_model_says(tmp_path):
    study = study_of(save_planted("gpt2", tmp_path / "model", 1, 2), draws=0)
    study.ask([KnownFact("0", FACTS[0]["prompt"], FACTS[0]["subject"], None, "golf")])
    found, _ = study.measure("before")
    assert study.encoder.decode([found.questions[0].answers["true"]]).strip() == FACTS[0]["ground_truth"]
    assert found.proposal() is None


FIGURES = ("similarity", "lens", "contribution", "effect", "tracing")


def drawn_events(folder: Path) -> dict[str, int]:
    """How many images each tag of the TensorBoard events has; all of them are decoded, and show something."""
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    tags = events.Tags()
    assert not any(tags[kind] for kind in ("scalars", "histograms", "tensors"))
    found = {}
    for tag in tags["images"]:
        images = events.Images(tag)
        for image in images:
            pixels = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
            assert pixels.shape[:2] == (image.height, image.width)
            assert pixels.shape[0] > 100
            assert pixels.std() > 1
        found[tag] = len(images)
    return found


def run_verb(tmp_path, *arguments: str) -> None:
    main(["analyze", "--out", str(tmp_path / "out"), "--model.device", "cpu", *arguments])


def test_the_command_on_atlas(tmp_path, caplog):
    caplog.set_level("INFO")
    run_verb(tmp_path, "--data.limit", "3", "--tracing.draws", "1")
    out = tmp_path / "out"
    known = json.loads((out / "analysis.json").read_text())
    assert known["facts"] == {"read": 3, "used": 3, "left_out": {}}
    assert re.search("layers proposed .*: too few facts to say", caplog.text)
    assert "too few facts to say" in (out / "lens.svg").read_text()
    assert {found["verdict"] for found in (*known["claims"], known["proposals"]["before"])} == {TOO_FEW}
    assert (known["conclusions"], known["window"]) == ({"before": TOO_FEW}, 1)
    finding, copied = caplog.messages[-1].splitlines()
    assert finding.endswith(f"shown? {TOO_FEW}")
    assert copied.endswith(f'--model.layers "{known["proposals"]["before"]["layers"]}"')
    assert copied.rpartition(": ")[2] in html.unescape((out / "analysis.html").read_text())
    layers = list(csv.DictReader((out / "layers.csv").read_text().splitlines()))
    lens = [row for row in layers if row["measure"] == "lens" and row["token"] == "last" and row["answer"] == "true"]
    assert [int(row["layer"]) for row in lens] == list(range(8))
    facts = list(csv.DictReader((out / "facts.csv").read_text().splitlines()))
    assert [f["relation"] for f in facts] == [edit.relation for edit in read_edits("atlas-records", limit=3)]
    assert float(lens[-1]["mean"]) == pytest.approx(sum(float(f["p_true"]) for f in facts) / 3, rel=1e-4)
    traced = list(csv.DictReader((out / "tracing.csv").read_text().splitlines()))
    assert {row["place"] for row in traced} <= set(POSITIONS)
    assert all(math.isfinite(float(row["mean"])) for row in traced)
    for name in FIGURES:
        assert (out / f"{name}.svg").read_text().rstrip().endswith("</svg>")
    assert drawn_events(out) == {f"analysis/{name}": 1 for name in FIGURES}
    before = sorted(path.name for path in out.iterdir())
    with pytest.raises(FileExistsError, match="--out"):
        run_verb(tmp_path)
    assert sorted(path.name for path in out.iterdir()) == before


@pytest.mark.slow
def test_known_facts_give_the_numbers_of_the_same_facts_as_records(tmp_path):
    """Written as ``known_facts`` and as edits, four facts of Atlas differ in the new answers only."""
    records = [record["requested_rewrite"] for record in json.loads(Path(locate("atlas-records")).read_text())[:4]]
    facts = [
        {
            "known_id": number,
            "subject": record["subject"],
            "attribute": record["target_true"]["str"],
            "template": record["prompt"],
            "prompt": record["prompt"].format(record["subject"]),
        }
        for number, record in enumerate(records)
    ]
    found = []
    for name, options in (("records", ["--data.limit", "4"]), ("known", ["--data.path", written(tmp_path, facts)])):
        arguments = ["--out", str(tmp_path / name), "--model.device", "cpu", "--tracing.draws", "1", *options]
        main(["analyze", *arguments])
        found.append(json.loads((tmp_path / name / "analysis.json").read_text()))
    of_records, of_known = found
    assert of_known["facts"] == of_records["facts"] == {"read": 4, "used": 4, "left_out": {}}
    assert of_known["claims"] == of_records["claims"]
    assert of_known["proposals"] == of_records["proposals"]
    for name, rows in of_records["measures"]["before"].items():
        assert of_known["measures"]["before"][name] == [row for row in rows if row.get("answer") != "new"]
    assert any(row["answer"] == "new" for row in of_records["measures"]["before"]["lens"])


def test_real_known_facts_that_a_model_does_not_know_are_refused(shared, tmp_path):
    path = str(shared / "data" / "known_facts_300.json")
    reasons = r"known_facts_300.json: none of the facts can be looked at \(.*20 left out: before: the answer is not"
    with pytest.raises(ValueError, match=reasons):
        run_verb(tmp_path, "--data.path", path, "--data.limit", "20")
    assert not (tmp_path / "out").exists()


def test_the_command_before_and_after_an_edit(tmp_path):
    folder = save_planted("gpt2", tmp_path / "model", 1, 2)
    study = study_of(folder)
    manifest = {"model": folder, "fingerprint": fingerprint(study.model), "dtype": "float32"}
    patch = str(tmp_path / "patch.safetensors")
    save_patch(patch, {study.sites.weight_name("ffn", 1): WeightDelta(edit_of(1))}, manifest)
    arguments = ["--model.patch", patch, "--data.path", written(tmp_path, records())]
    run_verb(tmp_path, "--model.model_name", folder, "--tracing.draws", "2", *arguments)
    known = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert (known["facts"]["read"], known["facts"]["used"]) == (3, 1)
    assert list(known["measures"]) == list(known["proposals"]) == ["before", "after"]
    assert drawn_events(tmp_path / "out") == {f"analysis/{name}": 1 for name in FIGURES}  # both phases in one
    rows = list(csv.DictReader((tmp_path / "out" / "facts.csv").read_text().splitlines()))
    assert [(row["case_id"], row["phase"], row["followed"]) for row in rows] == [
        ("1", "before", "true"),
        ("1", "after", "new"),
    ]
    with pytest.raises(PatchError, match="was made for the model"):
        main(["analyze", "--out", str(tmp_path / "other"), "--model.device", "cpu", *arguments])
    assert not (tmp_path / "other").exists()


def test_bad_input_leaves_nothing_behind(tmp_path):
    cases = [
        (ValueError, "none of the facts", ["--data.path", written(tmp_path, [KNOWN | {"attribute": "tennis"}])]),
        (FileNotFoundError, "no edits file", ["--data.path", "nowhere.json"]),
        (FileNotFoundError, "no patch", ["--model.patch", "nowhere.safetensors"]),
        (ValueError, "--model.device", ["--model.device", "abacus"]),
    ]
    for error, text, arguments in cases:
        with pytest.raises(error, match=text):
            run_verb(tmp_path, *arguments)
        assert not (tmp_path / "out").exists()
        assert [path.name for path in tmp_path.iterdir()] == ["records.json"]
