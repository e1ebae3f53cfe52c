"""Runs that end badly say so: nothing takes, a fact is undone, the model is damaged, a start fails."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from transformers import AutoModelForCausalLM

from pmet_lightning import Editor
from pmet_lightning.cli.dispatch import main
from pmet_lightning.evaluation.answers import edit_answer
from pmet_lightning.model.patch import load_patch
from pmet_lightning.run.lightning_cli import build_fit
from pmet_lightning.write.drift import DamagedModelError
from tests.harness import as_arguments, matrices, tiny_settings
from tests.tiny import save_tiny

FIRST = {
    "prompt": "{} became a champion of",
    "subject": "Clara Prilforth",
    "target_new": "water polo",
    "ground_truth": "golf",
}
SECOND = FIRST | {"prompt": "{} plays the sport of", "target_new": "cricket"}
DAMAGING = {"lam": 0.01, "clamp": 50.0, "data": {"limit": 8}, "drift": {"warn_from": 1.005, "damaged_from": 1.01}}


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    """Makes editors of Atlas that share their second moments, and measure damage only where a test asks for it."""
    folder = tmp_path_factory.mktemp("moments")

    def made(**changes) -> Editor:
        unmeasured = {"drift": {"text": None}}
        return Editor.from_config("pmet.yaml", moments={"folder": str(folder), "samples": 60}, **unmeasured | changes)

    return made


@pytest.mark.slow
def test_an_edit_that_does_not_take_is_not_a_success(atlas, tmp_path):
    editor = atlas(layers=[4, 5, 6], lam=1000, clamp=0.75, data={"limit": 6}, drift={})
    report = editor.edit("atlas-records", run_dir=str(tmp_path / "run"))
    assert (report.verdict.facts, report.verdict.said) == (6, 0)
    assert report.verdict.causes == {"not_found": 6}
    assert report.verdict.damage.level == "none"
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert state["verdict"] == report.verdict.plain()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "The model says 0 of 6 new facts by itself" in page
    assert "--model.clamp" in page
    assert "The model says".lower() in str(report)
    assert len(report.failed) == 6
    first = report.failed[0]
    assert (first["cause"], first["target"]) == ("not_found", "water polo")
    assert "clamp" in first["remedy"]
    frame = report.to_frame()
    assert list(frame["said"]) == [False] * 6
    assert list(frame["answer"]) == [row["answer"] for row in report.failed]
    assert "0 of 6" in report._repr_html_()
    assert "water polo" in report._repr_html_()


def test_answers_before_and_after_are_stored_and_shown(atlas, tmp_path):
    report = atlas(lam=20).edit([FIRST], run_dir=str(tmp_path))
    (line,) = [json.loads(text) for text in (tmp_path / "answers.jsonl").read_text().splitlines()]
    (question,) = line["questions"]
    assert (question["prompt"], question["expected"]) == ("Clara Prilforth became a champion of", "water polo")
    assert question["before"].strip().startswith("golf")
    assert question["after"].strip().startswith("water polo")
    assert (question["before_right"], question["after_right"]) == (False, True)
    assert list(report.answers) == [line]
    page = (tmp_path / "report.html").read_text()
    assert "All their questions" in page
    assert question["before"].strip() in page
    assert "efficacy_low" not in report.scores["after"], "one record has no interval"
    assert (report.failed, report.verdict.said) == ((), 1)


@pytest.mark.parametrize("evaluate", [True, False])
def test_a_fact_that_a_later_batch_undoes_is_not_said(atlas, evaluate):
    """Right after its edit batch it was said, as its ledger line tells."""
    report = atlas(lam=20, edit_batch=1).edit([FIRST, SECOND], evaluate=evaluate)
    assert [line["said"] for line in report.edits] == [True, True]
    assert [outcome.cause for outcome in report.outcomes] == ["overwritten", None]
    assert "cricket" in report.outcomes[0].answer
    assert report.verdict.causes == {"overwritten": 1}


def test_two_facts_that_share_a_key_in_one_batch(atlas):
    """The one that loses names the other by chance, a sentence later."""
    report = atlas(lam=20).edit([FIRST, SECOND])
    assert [outcome.said for outcome in report.outcomes].count(False) == 1
    assert set(report.verdict.causes) <= {"same_subject", "other_words"}


@pytest.mark.slow
def test_a_later_call_tells_which_earlier_fact_it_undoes(atlas):
    editor = atlas(lam=20)
    assert editor.edit([FIRST]).verdict.undone == ()
    report = editor.edit([SECOND])
    assert report.verdict.said == 1
    assert report.verdict.undone == ("Clara Prilforth became a champion of",)
    assert "no longer said" in str(report)
    editor.undo()
    replaced = editor.edit([FIRST | {"target_new": "cricket"}])
    assert replaced.verdict.undone == (), "the same question: replaced on purpose"
    editor.revert()
    assert editor.edit([SECOND]).verdict.undone == ()


def test_a_damaged_model_is_no_success(atlas, tmp_path):
    editor = atlas(**DAMAGING)
    report = editor.edit("atlas-records", run_dir=str(tmp_path / "kept"))
    assert report.verdict.damage.level == "damaged"
    assert json.loads((tmp_path / "kept" / "state.json").read_text())["status"] == "damaged"
    assert "DAMAGED" in (tmp_path / "kept" / "report.html").read_text()


@pytest.mark.slow
def test_a_damaged_model_is_an_error_on_request(atlas, tmp_path):
    editor = atlas(**{**DAMAGING, "drift": {**DAMAGING["drift"], "fail_if_damaged": True}})
    clean = {name: tensor.clone() for name, tensor in editor.model.state_dict().items()}
    with pytest.raises(DamagedModelError, match=r"DAMAGED.*fail_if_damaged"):
        editor.edit("atlas-records", run_dir=str(tmp_path / "refused"))
    assert all(torch.equal(tensor, clean[name]) for name, tensor in editor.model.state_dict().items())
    assert editor.edits_written == 0
    assert json.loads((tmp_path / "refused" / "state.json").read_text())["status"] == "damaged"
    with pytest.raises(DamagedModelError):
        editor.edit("atlas-records")


@pytest.mark.slow
def test_a_ruined_real_model(shared, tmp_path):
    """Twenty facts in a model of 260,000 parameters with a λ that is far too small."""
    model = shared / "data" / "models" / "stories260K"
    if not model.is_dir():
        pytest.skip("no story model")
    settings = {
        "trainer.run_dir": str(tmp_path / "run"), "trainer.accelerator": "cpu", "trainer.enable_progress_bar": False,
        "model.model_name": str(model), "model.layers": [1, 2, 3], "spread.lam": 30, "data.limit": 20,
        "data.path": str(shared / "data" / "counterfact_250.json"), "moments.samples": 200,
        "moments.corpus": str(shared / "data" / "wikitext2_valid.raw"), "moments.folder": str(tmp_path / "moments"),
        "drift.text": str(shared / "data" / "wikitext2_test.raw"), "drift.fail_if_damaged": True,
    }  # fmt: skip
    with pytest.raises(DamagedModelError):
        main(["fit", "--config", "pmet.yaml", *as_arguments(settings)])
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert state["status"] == state["verdict"]["damage"] == "damaged"
    assert state["verdict"]["said"] <= 2
    assert state["verdict"]["perplexity_factor"] > 3


def test_a_failed_start_leaves_no_folder(tmp_path):
    settings = tiny_settings(tmp_path, save_tiny("gptj", tmp_path / "model")) | {"model.layers": [1, 2]}
    for fault in ({"model.layers": [9]}, {"moments.corpus": str(tmp_path / "none.txt")}, {"data.path": "none.json"}):
        with pytest.raises((ValueError, OSError)):
            main(["fit", "--config", "pmet.yaml", *as_arguments(settings | fault)])
        assert not (tmp_path / "run").exists(), fault
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").touch()
    with pytest.raises(ValueError, match="expected different layers"):
        main(["fit", "--config", "pmet.yaml", *as_arguments(settings | {"model.layers": [9]})])
    assert (tmp_path / "run" / "mine.txt").is_file(), "a folder that was there stays"


def test_validate_leaves_scores_and_answers_beside_those_of_a_run(tmp_path, caplog):
    settings = tiny_settings(tmp_path, save_tiny("gptj", tmp_path / "model")) | {"model.layers": [1, 2]}
    main(["fit", "--config", "pmet.yaml", *as_arguments(settings)])
    fitted = json.loads((tmp_path / "run" / "scores.json").read_text())
    with caplog.at_level("INFO"):
        main(["validate", "--config", "pmet.yaml", *as_arguments(settings | {"trainer.logger": False})])
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert {phase: scores[phase] for phase in fitted} == fitted
    assert scores["validate"] == pytest.approx(fitted["before"])
    lines = [json.loads(text) for text in (tmp_path / "run" / "answers-validate.jsonl").read_text().splitlines()]
    before = [json.loads(text) for text in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()]
    assert [edit_answer(line)[0] for line in lines] == [line["questions"][0]["before"] for line in before]
    assert "\nvalidate " in caplog.text
    assert "the model says 0 of 2 new facts" in caplog.text


def test_the_answers_of_a_stream_are_kept_by_edit_batch(tmp_path):
    settings = tiny_settings(tmp_path, save_tiny("gptj", tmp_path / "model")) | {"model.layers": [1, 2]}
    records = tmp_path / "records.jsonl"
    facts = json.loads((tmp_path / "records.json").read_text())
    records.write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    stream = {"data.path": str(records), "data.stream": True, "data.edit_batch": 1}
    main(["fit", "--config", "pmet.yaml", *as_arguments(settings | stream)])
    lines = [json.loads(text) for text in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()]
    assert [line["target"] for line in lines] == [fact["target_new"] for fact in facts]
    assert all({"before", "after"} <= set(line["questions"][0]) for line in lines)
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert (state["verdict"]["facts"], state["verdict"]["asked"]) == (2, "right after the edit batch")


def test_a_baseline_has_a_verdict_without_causes(tmp_path):
    settings = tiny_settings(tmp_path, save_tiny("gptj", tmp_path / "model")) | {"model.layers": [1, 2]}
    kept = {name: value for name, value in settings.items() if not name.startswith(("moments", "model.steps"))}
    cli = build_fit("finetune.yaml", kept | {"model.layers": [2], "model.epochs": 1}, "finetune")
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    verdict = cli.trainer.recorder.outcome.verdict
    assert asdict(verdict)["causes"] == {"unknown": 2}


@pytest.mark.parametrize(("keep", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_export_keeps_what_the_run_kept(tmp_path, caplog, keep, dtype):
    settings = tiny_settings(tmp_path, save_tiny("gptj", tmp_path / "model")) | {"model.layers": [1, 2]}
    half = {"model.dtype": "bfloat16", "model.keep_float32": keep, "model.layers": [1, 2], "model.clamp": 0.02}
    main(["fit", "--config", "pmet.yaml", *as_arguments(settings | half)])
    with caplog.at_level("INFO"):
        main(["export", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "auto")])
        text = caplog.text
        main(["export", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "half"), "--dtype", "bfloat16"])
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).float()
    deltas = matrices(load_patch(tmp_path / "run" / "patch.safetensors")[0])
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "auto", dtype="auto")
    assert opened.dtype == dtype
    lost = []
    for folder in ("auto", "half"):
        edited = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype="auto")
        changes = {name: edited.state_dict()[name].float() - base.state_dict()[name] for name in deltas}
        square = sum(float((changes[name] - delta).square().sum()) for name, delta in deltas.items())
        lost.append((square / sum(float(delta.square().sum()) for delta in deltas.values())) ** 0.5)
    assert lost[0] < 1e-4 if keep else lost[0] == lost[1]
    assert f"{100 * lost[1]:.1f} % of the norm of dW" in text
    assert ("all weights are written in float32" in text) is keep
    assert ("--dtype float32 keeps all of it" in caplog.text.removeprefix(text)) is keep
