"""Whole runs through the command line: what they leave, what they refuse, what they survive."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTBigCodeConfig

from pmet_lightning.cli.dispatch import main
from pmet_lightning.data.corpus import corpus_texts, pack_rows
from pmet_lightning.data.encoder import PromptEncoder
from pmet_lightning.evaluation.scores import METRICS
from pmet_lightning.model.architectures import UnknownArchitectureError
from pmet_lightning.model.loading import load_model
from pmet_lightning.model.patch import PatchError, apply_patch, load_patch
from pmet_lightning.utils.resources import locate
from tests.conftest import ROOT
from tests.harness import as_arguments, matrices, tiny_fit, tiny_settings
from tests.tiny import save_tiny

SMALL = [
    "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--data.limit", "12",
    "--data.edit_batch", "8", "--model.micro_batch", "5", "--moments.samples", "60", "--spread.lam", "20",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Twelve edits of Atlas in two edit batches, once for all tests of what a run leaves."""
    base = tmp_path_factory.mktemp("run")
    folder = base / "out"
    arguments = ["fit", "--config", "pmet.yaml", "--trainer.run_dir", str(folder), *SMALL]
    main([*arguments, "--moments.folder", str(base / "moments")])
    return folder


def test_what_a_run_leaves(run):
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "contexts.json", "ledger.jsonl", "metrics.csv", "patch.safetensors", "patch.json",
            "scores.json", "state.json", "answers.jsonl"} <= names  # fmt: skip
    assert not [name for name in names if name.endswith(".tmp")]
    state = json.loads((run / "state.json").read_text())
    verdict = state.pop("verdict")
    assert state == {"status": "finished", "edit_batches_written": 2, "edits_written": 12}
    assert verdict["facts"] == 12
    assert len(json.loads((run / "contexts.json").read_text())) == 3


def test_the_ledger_has_a_line_for_every_edit(run):
    lines = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    records = json.loads(Path(locate("atlas-records")).read_text())[:12]
    assert [line["case_id"] for line in lines] == [str(record["case_id"]) for record in records]
    assert [line["edit_batch"] for line in lines] == [0] * 8 + [1] * 4
    for line in lines:
        assert 1 <= line["steps"] <= 30
        assert line["stop_reason"] in ("loss", "argmax", "steps")
        assert line["p_after"] > line["p_before"]
        assert line["p_prompt_after"] > line["p_prompt_before"]
        assert line["residual_left"] < 1
        assert line["solve_error"]
        assert max(line["solve_error"].values()) < 1e-8
    said = sum(line["answer"].strip().startswith(line["target"]) for line in lines)
    assert said >= 10


def test_every_second_belongs_to_a_phase(run):
    report = json.loads((run / "report.json").read_text())
    phases = ["records", "model", "moments", "contexts", "before", "targets", "spread", "ledger", "after", "report"]
    assert list(report["phases"]) == [*phases, "other"]
    assert report["phases"]["other"] < 0.1 * sum(report["phases"].values())
    since_moments = sum(report["phases"][phase] for phase in phases[3:])
    assert since_moments == pytest.approx(report["seconds"], abs=0.3 + report["phases"]["report"])
    for phase in ("moments", "before", "targets", "spread", "after"):
        assert report["phases"][phase] > 0.01, phase


def test_scores_before_and_after(run):
    scores = json.loads((run / "scores.json").read_text())
    assert scores["before"]["count"] == scores["after"]["count"] == 12
    assert scores["before"]["efficacy"] <= 10
    assert scores["after"]["efficacy"] >= 90
    assert scores["after"]["score_low"] <= scores["after"]["score"] <= scores["after"]["score_high"]
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    for group, phase in (("9_before", "before"), ("1_scores", "after")):
        logged = [float(row[f"{group}/score"]) for row in rows if row.get(f"{group}/score")]
        assert logged == pytest.approx([scores[phase]["score"]])


def test_scores_of_each_edit_batch_and_what_is_forgotten(run):
    """The first of two batches is evaluated before the second is written."""
    scores = json.loads((run / "scores.json").read_text())
    first, second = scores["edit_batches"]
    assert [batch["at_once"]["count"] for batch in (first, second)] == [8, 4]
    assert second["at_once"] == pytest.approx(second["at_the_end"], abs=1e-4), "nothing came after it"
    for batch in (first, second):
        for name, lost in batch["forgotten"].items():
            assert lost == pytest.approx(batch["at_once"][name] - batch["at_the_end"][name])
    mean = (8 * first["at_the_end"]["efficacy"] + 4 * second["at_the_end"]["efficacy"]) / 12
    assert mean == pytest.approx(scores["after"]["efficacy"])


def test_free_answers_are_judged_beside_the_teacher_forced(run):
    scores = json.loads((run / "scores.json").read_text())
    assert scores["before"]["efficacy_contains"] <= 10
    assert scores["after"]["efficacy_contains"] >= 80
    gap = scores["after"]["efficacy"] - scores["after"]["efficacy_contains"]
    assert scores["after"]["efficacy_gap"] == pytest.approx(gap)


@torch.no_grad()
def test_plain_text_is_watched(run):
    """Against the whole model on one row at a time, by transformers' own loss."""
    scores = json.loads((run / "scores.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(locate("atlas")).eval()
    edited = AutoModelForCausalLM.from_pretrained(locate("atlas")).eval()
    deltas = matrices(load_patch(run / "patch.safetensors")[0])
    for name, delta in deltas.items():
        edited.get_submodule(name.removesuffix(".weight")).weight += delta
    texts = corpus_texts(locate("atlas-corpus"), seed=1)
    rows = [row.ids for row in islice(pack_rows(texts, AutoTokenizer.from_pretrained(locate("atlas")), 64), 64)]
    losses, logits = {}, {}
    for name, model in (("before", base), ("after", edited)):
        outputs = [model(torch.tensor([ids]), labels=torch.tensor([ids])) for ids in rows]
        losses[name] = torch.stack([output.loss for output in outputs])
        logits[name] = torch.stack([output.logits[0, -2] for output in outputs]).log_softmax(-1)
        assert scores[name]["perplexity"] == pytest.approx(float(losses[name].mean().exp()), rel=1e-4)
    kl = torch.nn.functional.kl_div(logits["after"], logits["before"], log_target=True, reduction="batchmean")
    assert scores["after"]["kl"] == pytest.approx(float(kl), rel=1e-3)
    assert scores["after"]["perplexity"] != scores["before"]["perplexity"]


def test_tensorboard_has_every_step_and_layer(run):
    events = EventAccumulator(str(run))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {f"9_live/{name}" for name in ("loss", "loss_nll", "loss_kl", "loss_norm", "p", "active_edits")} <= tags
    assert {f"5_layers/residual_after/ffn_layer_{layer}" for layer in (0, 1, 2)} <= tags
    assert {f"1_scores/{name}" for name in ("efficacy", "score")} <= tags
    steps = [point.step for point in events.Scalars("9_live/loss")]
    assert steps == list(range(len(steps)))
    assert len(events.Scalars("5_layers/residual_after/ffn_layer_0")) == 2  # edit batches
    figures = {f"6_figures/{name}" for name in ("loss", "steps", "residual", "norms", "forgetting_score")}
    assert figures <= set(events.Tags()["images"])


def test_the_patch_holds_the_edited_layers_only(run):
    deltas, manifest = load_patch(run / "patch.safetensors")
    assert sorted(deltas) == [f"transformer.h.{layer}.mlp.fc_out.weight" for layer in (0, 1, 2)]
    assert all(delta.shape == (192, 768) and delta.dtype == torch.float32 for delta in deltas.values())
    assert manifest["edits"] == 12
    assert manifest["edit_batches"] == 2
    assert manifest == json.loads((run / "patch.json").read_text())


def test_export_opens_anywhere_and_knows_the_new_facts(run, tmp_path):
    main(["export", "--run", str(run), "--out", str(tmp_path / "model")])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(locate("atlas"))
    lines = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    right = {"edited": 0, "base": 0}
    for line in lines:
        prompt = tokenizer(line["prompt"].replace("{}", line["subject"]), return_tensors="pt").input_ids
        for name, asked in (("edited", model), ("base", base)):
            output = asked.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
            right[name] += tokenizer.decode(output[0, prompt.shape[1] :]).strip().startswith(line["target"])
    assert right["edited"] >= 10
    assert right["base"] == 0
    with pytest.raises(FileExistsError, match="holds something"):
        main(["export", "--run", str(run), "--out", str(tmp_path / "model")])


def test_validate_sees_the_patched_model(run, tmp_path, caplog):
    arguments = ["validate", "--config", "pmet.yaml", "--trainer.run_dir", str(tmp_path / "v"), *SMALL]
    with caplog.at_level("INFO"):
        main([*arguments, "--trainer.logger", "false", "--model.patch", str(run / "patch.safetensors")])
    after = json.loads((run / "scores.json").read_text())["after"]
    line = next(line for line in caplog.text.splitlines() if line.startswith("validate"))
    shown = [float(value) for value in re.findall(r"(\S+) \[", line)]
    assert shown == pytest.approx([after[name] for name in METRICS], abs=0.06)


def test_a_patch_of_another_model_is_refused(run, tmp_path):
    from pmet_lightning.model.architectures import ARCHITECTURES
    from pmet_lightning.model.fingerprint import fingerprint
    from pmet_lightning.model.projections import Sites

    model = load_model(save_tiny("gptj", tmp_path / "tiny"))
    sites = Sites.of(model, ARCHITECTURES["gptj"])
    with pytest.raises(PatchError, match="was made for the model 'atlas'"):
        apply_patch(model, sites, run / "patch.safetensors", fingerprint(model))
    with pytest.raises(FileNotFoundError, match="no patch"):
        load_patch(tmp_path / "nothing.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    with pytest.raises(PatchError, match="not a patch"):
        load_patch(tmp_path / "bad.safetensors")


def test_a_used_folder_is_refused_and_left_alone(run):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(FileExistsError, match="holds another run"):
        main(["fit", "--config", "pmet.yaml", "--trainer.run_dir", str(run), *SMALL])
    assert before == {path.name: path.read_bytes() for path in run.iterdir()}


def test_an_interrupt_leaves_whole_edit_batches(run, tmp_path, monkeypatch):
    """Interrupted in the second edit batch, the folder says one, and its patch is that of the first."""
    from pmet_lightning.write import weight_spread as spread

    collect, calls = spread.measure_keys, []

    def interrupt_in_the_second_batch(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return collect(*args)

    monkeypatch.setattr(spread, "measure_keys", interrupt_in_the_second_batch)
    folder = tmp_path / "out"
    arguments = ["fit", "--config", "pmet.yaml", "--trainer.run_dir", str(folder), *SMALL]
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main([*arguments, "--moments.folder", str(run.parent / "moments")])
    state = json.loads((folder / "state.json").read_text())
    assert state["status"] == "interrupted"
    assert (state["edit_batches_written"], state["edits_written"]) == (1, 8)
    assert len((folder / "ledger.jsonl").read_text().splitlines()) == 8
    assert load_patch(folder / "patch.safetensors")[1]["edits"] == 8


@pytest.mark.slow
def test_stats_then_fit_finds_them(tmp_path, caplog):
    moments = ["--moments.folder", str(tmp_path / "moments")]
    config = ["--config", "pmet.yaml", *SMALL, *moments]
    with caplog.at_level("INFO"):
        main(["stats", *config, "--trainer.run_dir", str(tmp_path / "s")])
    assert "collecting them" in caplog.text
    assert not (tmp_path / "s" / "state.json").exists()
    files = list((tmp_path / "moments").rglob("*.safetensors"))
    assert len(files) == 3
    caplog.clear()
    with caplog.at_level("INFO"):
        main(["fit", *config, "--trainer.run_dir", str(tmp_path / "f"), "--data.limit", "1"])
    assert "collecting them" not in caplog.text
    assert "second moments of 3 projections ready" in caplog.text


ERRORS = {
    "layer": (["--model.layers", "[0,8]"], "expected different layers from 0 to 7"),
    "model": (["--model.model_name", "nowhere/at-all"], "cannot load 'nowhere/at-all'"),
    "data": (["--data.path", "missing.json"], "no edits file 'missing.json'"),
    "corpus": (["--moments.corpus", "missing.txt"], "no corpus 'missing.txt'"),
    "attention": (["--model.optimize", "ffn", "--spread.write", "attn+ffn"], "set --model.optimize attn"),
    "context": (["--model.contexts", '["no place"]'], "expected exactly one"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_settings_end_in_a_message_before_any_work(name, tmp_path):
    arguments, message = ERRORS[name]
    out = tmp_path / "out"
    extra = ["--moments.folder", str(tmp_path / "m"), "--trainer.run_dir", str(out)]
    with pytest.raises((ValueError, OSError), match=message):
        main(["fit", "--config", "pmet.yaml", *SMALL, *extra, *arguments])
    assert not (out / "patch.safetensors").exists()


def test_statistics_of_another_model_are_refused(run, tmp_path):
    given = next(path.parent for path in (run.parent / "moments").rglob("ffn-0.safetensors"))
    tiny = save_tiny("gptj", tmp_path / "tiny")
    arguments = ["--moments.given", str(given), "--model.model_name", tiny, "--trainer.run_dir", str(tmp_path / "o")]
    with pytest.raises(ValueError, match="another model: expected"):
        main(["fit", "--config", "pmet.yaml", *SMALL, *arguments])


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pmet_lightning", *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_the_command_line_from_any_folder(tmp_path):
    shown = command("fit", "--config", "pmet.yaml", "--print_config", cwd=tmp_path)
    assert "model_name: atlas" in shown.stdout
    assert shown.returncode == 0
    assert "Loading weights" not in shown.stderr
    assert list(tmp_path.iterdir()) == []
    unknown = command("fit", "--config", "nothing.yaml", cwd=tmp_path)
    assert unknown.returncode == 2
    assert "pmet.yaml" in unknown.stderr
    assert "Traceback" not in unknown.stderr


def test_help(capsys):
    main(["--help"])
    shown = capsys.readouterr().out
    for command in ("fit", "validate", "test", "stats", "finetune", "compare", "export", "harness", "demo"):
        assert f"\n  {command} " in shown
    main(["fit", "--help"])
    shown = capsys.readouterr().out
    assert "--model.clamp" in shown
    assert "--trainer.max_epochs" not in shown
    with pytest.raises(ValueError, match="did you mean --model.clamp"):
        main(["fit", "--config", "pmet.yaml", "--model.clam", "3"])


def test_readme_files_exist():
    assert (ROOT / "configs" / "pmet.yaml").is_file()


def test_a_chat_model_is_edited_inside_its_template(tmp_path, monkeypatch):
    folder = save_tiny("llama", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    encode, texts = PromptEncoder.encode, []

    def watched(self, *args, **kwargs):
        row = encode(self, *args, **kwargs)
        texts.append(self.decode(row.ids))
        return row

    monkeypatch.setattr(PromptEncoder, "encode", watched)
    lines = tiny_fit(tmp_path, folder, "--model.layers", "auto", "--model.chat", "true")
    assert len(lines) == 2
    assert texts
    assert all(text.startswith("<user>") for text in texts)
    with pytest.raises((SystemExit, ValueError)):
        tiny_fit(tmp_path / "run", save_tiny("llama", tmp_path / "plain"), "--model.chat", "true")


def test_an_unlisted_family_is_described_in_five_lines(tmp_path):
    config = GPTBigCodeConfig(vocab_size=3000, n_embd=32, n_head=4, n_layer=4, n_positions=128)
    model = tmp_path / "model"
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    AutoTokenizer.from_pretrained(locate("atlas")).save_pretrained(model)
    described = tmp_path / "starcoder.yaml"
    described.write_text(
        "model:\n  architecture:\n    layers: transformer.h\n    attn: attn.c_proj\n    ffn: mlp.c_proj\n"
    )
    with pytest.raises((SystemExit, UnknownArchitectureError)):
        tiny_fit(tmp_path, str(model))
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    command = ["fit", "--config", "pmet.yaml", "--config", str(described)]
    main([*command, *as_arguments(tiny_settings(tmp_path, str(model)) | {"model.layers": "auto"})])
    assert len((tmp_path / "run" / "ledger.jsonl").read_text().splitlines()) == 2
