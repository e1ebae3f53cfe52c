"""The command ``tune`` and ``Editor.tune``, on tiny models with few trials, and on Atlas."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from pmet_lightning import Editor
from pmet_lightning.cli.dispatch import main
from pmet_lightning.data.encoder import load_tokenizer
from pmet_lightning.data.readers import read_edits, read_records
from pmet_lightning.model.fingerprint import fingerprint
from pmet_lightning.model.loading import load_model, set_plain_outputs
from pmet_lightning.run.lightning_cli import run_fit
from pmet_lightning.tune.bench import Bench
from pmet_lightning.tune.space import PRESERVE_PROMPTS, Scale, Setting, TargetSetting, WriteSetting
from tests.conftest import ROOT, mostly_slow
from tests.tiny import save_tiny

EDITS, TRIALS = 12, 2
PROPOSED = 0  # the layer of the analysis; without one the first is a quarter of the way up
FIXED = {"steps": 4, "context_count": 1, "context_length": 4, "free_tokens": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a tiny model, records, a text, the moments of all searches, and an analysis."""
    folder = tmp_path_factory.mktemp("tune")
    save_tiny("gptj", folder / "model")
    records = [record for _, _, record in read_records("atlas-tuning", limit=40)]
    (folder / "facts.json").write_text(json.dumps(records))
    (folder / "text.txt").write_text("\n".join(edit.question for edit in read_edits("atlas-records", limit=60)))
    (folder / "analysis").mkdir()
    proposal = {"layers": [PROPOSED], "verdict": "likely"}
    (folder / "analysis" / "analysis.json").write_text(json.dumps({"proposals": {"before": proposal}}))
    return folder


def command(folder: Path, out: str, **changes) -> list[str]:
    """The command line of a search."""
    options = {
        "model.model_name": folder / "model",
        "model.device": "cpu",
        "data.path": folder / "facts.json",
        "moments.corpus": folder / "text.txt",
        "moments.samples": 40,
        "moments.folder": folder / "moments",
        "analysis": folder / "analysis",
        "trials": TRIALS,
        "edits": EDITS,
        "out": folder / out,
    }
    return ["tune", *(f"--{name}={value}" for name, value in (options | changes).items())]


@pytest.fixture(scope="module")
def found(folder) -> Path:
    """The folder of a search that went through."""
    main(command(folder, "found"))
    return folder / "found"


def measured(out: Path) -> list[list[str]]:
    """What was measured, without how long it took."""
    lines = [line.split("\t") for line in (out / "trials.tsv").read_text().splitlines()]
    return [line[:-1] for line in lines if lines[0][-1] == "seconds"]


def check_that_fit_gives_the_reported_figure(found: Path, tmp_path: Path) -> None:
    """`fit` with the configuration that a search has left has the scores that it reported."""
    quiet = {"trainer.run_dir": str(tmp_path / "run"), "trainer.logger": False, "trainer.accelerator": "cpu"}
    run_fit(str(found / "tuned.yaml"), quiet)
    after = json.loads((tmp_path / "run" / "scores.json").read_text())["after"]
    reported = json.loads((found / "tuned.json").read_text())["reporting"]
    for name in ("efficacy", "generalisation", "specificity", "score", "efficacy_contains", "perplexity"):
        assert after[name] == pytest.approx(reported[name], abs=1e-4), name


def test_the_configuration_is_accepted_by_fit_and_gives_the_reported_figure(found, tmp_path):
    check_that_fit_gives_the_reported_figure(found, tmp_path)


@pytest.mark.slow
def test_targets_that_are_found_layer_by_layer_are_searched_too(folder, tmp_path):
    main(command(folder, "successive", targets="[successive]"))
    settings = yaml.safe_load((folder / "successive" / "tuned.yaml").read_text())
    assert settings["spread"]["targets"] == "successive"
    assert settings["model"]["stop_at_argmax"] is False
    check_that_fit_gives_the_reported_figure(folder / "successive", tmp_path)


def test_the_configuration_says_what_was_chosen_and_how_sure_that_is(found):
    text = (found / "tuned.yaml").read_text()
    reported = json.loads((found / "tuned.json").read_text())["reporting"]
    head = text[: text.index("\n\n")]
    assert all(line.startswith("#") for line in head.splitlines())
    score, low, high = (reported[name] for name in ("score", "score_low", "score_high"))
    assert f"Score {score:.1f} [{low:.1f}, {high:.1f}]" in head
    assert "12 records of other subjects" in head
    assert "With your-model.yaml and layers auto instead: Score" in head
    settings = yaml.safe_load(text)
    assert settings["data"]["limit"] == EDITS
    assert settings["model"]["keep_float32"] is True
    assert settings["spread"]["preserve_prompts"] == PRESERVE_PROMPTS
    assert settings["drift"]["text"] == settings["moments"]["corpus"] == str(found.parent / "text.txt")
    chosen = [row for row in measured(found) if row[0] == "finalists"]
    assert str(settings["spread"]["lam"]).removesuffix(".0") in {cell for row in chosen for cell in row}


def test_records_to_tune_on_and_to_report_share_no_subject(found):
    parts = [{edit.subject for edit in read_edits(found / name)} for name in ("tuning.json", "reporting.json")]
    assert parts[0]
    assert not parts[0] & parts[1]
    assert sum(map(len, parts)) == len({edit.subject for edit in read_edits(found.parent / "facts.json")})


def test_the_page_shows_all_that_was_tried(found):
    page = (found / "tuned.html").read_text()
    assert page.count("<svg") == 3
    assert not re.search(r"https?://(?!www\.w3\.org)", page), "it needs nothing but a browser"
    rows = measured(found)
    assert f"{len(rows) - 1} settings measured" in page
    assert {row[0] for row in rows[1:]} == {"layers", "settings", "finalists"}


def test_the_layers_of_an_analysis_are_looked_at_first(found):
    head, *rows = measured(found)
    cells = [row[head.index("layers")] for row in rows if row[0] == "layers"]
    looked_at = list(dict.fromkeys(int(re.findall(r"\d+", cell)[-1]) for cell in cells))
    assert looked_at[0] == PROPOSED
    assert len(looked_at) > 1, "it does not decide"


def test_one_search_for_targets_serves_several_writes(found):
    rows = [line.split("\t") for line in (found / "trials.tsv").read_text().splitlines()]
    stage, trial = rows[0].index("stage"), rows[0].index("trial")
    writes: dict[tuple, int] = {}
    for row in rows[1:]:
        writes[row[stage], row[trial]] = writes.get((row[stage], row[trial]), 0) + 1
    assert min(writes.values()) >= 2


@pytest.mark.slow
def test_a_search_that_was_stopped_goes_on_and_ends_as_if_it_had_not(folder, found, monkeypatch):
    real, count = Bench.measure, 0

    def measure(self, *args, **kwargs):
        nonlocal count
        count += 1
        if count in (7, 22):
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Bench, "measure", measure)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                main(command(folder, "stopped"))
        main(command(folder, "stopped"))
    numbers = {"trial"}
    first, again = measured(found), measured(folder / "stopped")
    keep = [i for i, name in enumerate(first[0]) if name not in numbers]
    assert [[row[i] for i in keep] for row in again] == [[row[i] for i in keep] for row in first]
    settings = [(out / "tuned.yaml").read_text().split("\n\n", 1)[1] for out in (found, folder / "stopped")]
    assert settings[0] == settings[1].replace(str(folder / "stopped"), str(found))
    count = 100
    with monkeypatch.context() as patched:
        patched.setattr(Bench, "measure", measure)
        main(command(folder, "stopped"))
    assert count == 102, "a finished search measures only the figures at its end"


def test_a_folder_of_another_search_is_refused(folder, found):
    with pytest.raises(FileExistsError, match="another model, other facts, edits, seed or options"):
        main(command(folder, "found", seed=1))


def test_a_model_that_knows_nothing_needs_records_of_its_own(folder):
    arguments = [word for word in command(folder, "unknown") if not word.startswith("--data.path")]
    with pytest.raises(ValueError, match=r"knows too few of the shipped facts .* --data.path facts.json"):
        main(arguments)
    assert not (folder / "unknown").exists()


def test_the_last_line_is_the_command_to_run_next_and_a_bad_model_is_named(found, folder, caplog):
    with caplog.at_level("INFO"):
        main(command(folder, "found"))
    *_, last = caplog.messages[-1].splitlines()
    assert last.startswith(f"next: pmet-lightning fit --config {found / 'tuned.yaml'}")
    assert "NOTICE: this method will not do well on this model" in caplog.messages[-1], "a random model holds no facts"
    assert "NOTICE: this method will not do well" in (found / "tuned.yaml").read_text()
    assert "This method will not do well" in (found / "tuned.html").read_text()


def bench_of(name: str, folder: Path, dtype: str, **model) -> Bench:
    lm = load_model(name, dtype)
    set_plain_outputs(lm)
    base = {
        "model": {"dtype": dtype, **FIXED, **model},
        "moments": {"corpus": str(folder / "text.txt"), "samples": 40, "folder": str(folder / "moments")},
        "spread": {"preserve_prompts": PRESERVE_PROMPTS},
    }
    return Bench(lm, load_tokenizer(name), name, base, folder / "targets")


TRIALS_OF = [("float32", False, "spread"), ("bfloat16", True, "spread"), ("float32", False, "successive")]


@pytest.mark.parametrize(("dtype", "kept", "targets"), mostly_slow(TRIALS_OF, TRIALS_OF[1:2]))
def test_a_trial_is_a_fit_and_leaves_the_model_as_it_was(folder, tmp_path, dtype, kept, targets):
    name = str(folder / "model")
    bench = bench_of(name, folder, dtype, keep_float32=kept)
    before = fingerprint(bench.model)
    scale = Scale({2: 0.2}, {2: 0.2}, 128)
    settings = scale.sections(Setting(TargetSetting(2, "ffn", 4.0, 0.2, "published", targets), WriteSetting(2, "even")))
    outcome = bench.measure(settings, [read_edits(folder / "facts.json", limit=8)])
    assert fingerprint(bench.model) == before
    assert not [m for m in bench.model.modules() if "forward" in vars(m)]
    flat = {f"model.{key}": value for key, value in (bench.base["model"] | settings["model"]).items()}
    flat |= {f"spread.{key}": value for key, value in settings["spread"].items()}
    flat |= {f"moments.{key}": value for key, value in bench.base["moments"].items()}
    flat |= {"model.targets_folder": None, "model.model_name": name, "data.path": str(folder / "facts.json")}
    flat |= {
        "data.limit": 8,
        "spread.max_change": None,
        "drift.text": None,
        "trainer.accelerator": "cpu",
        "trainer.logger": False,
    }
    run_fit("your-model.yaml", flat | {"trainer.run_dir": str(tmp_path / "run"), "moments.length": 128})
    after = json.loads((tmp_path / "run" / "scores.json").read_text())["after"]
    for key in ("efficacy_magnitude", "generalisation_magnitude", "specificity_magnitude", "specificity_kl"):
        assert outcome.scores[key] == pytest.approx(after[key], rel=1e-3, abs=1e-5), key
    again = bench.measure(settings, [read_edits(folder / "facts.json", limit=8)])
    assert torch.equal(again.rows.nan_to_num(), outcome.rows.nan_to_num())


def test_in_half_precision_too_one_search_for_targets_serves_several_writes(folder, tmp_path):
    bench = bench_of(str(folder / "model"), folder, "bfloat16", keep_float32=True)
    bench.base["model"]["targets_folder"] = str(tmp_path)
    target, edits, found = TargetSetting(2, "ffn", 4.0, 0.2), read_edits(folder / "facts.json", limit=4), []
    scale = Scale({2: 0.2}, {2: 0.2}, 128)
    for width in (1, 3):
        bench.measure(scale.sections(Setting(target, WriteSetting(width))), [edits])
        found.append({path.name for path in tmp_path.iterdir()})
    assert len(found[0]) >= 4
    assert found[0] == found[1]


@pytest.mark.slow
def test_an_editor_finds_settings_that_an_editor_takes(folder):
    lm, tokenizer = load_model(str(folder / "model"), "float32"), load_tokenizer(str(folder / "model"))
    moments = {"corpus": str(folder / "text.txt"), "samples": 40, "folder": str(folder / "moments")}
    editor = Editor(lm, tokenizer, steps=4, moments=moments, spread={"preserve_prompts": None})
    before = fingerprint(lm)
    records = json.loads((folder / "facts.json").read_text())
    settings = editor.tune(records, trials=1, edits=8, folder=folder / "editor")
    assert fingerprint(lm) == before
    kept = settings["steps"], settings["spread"]["preserve_prompts"]
    assert kept == (4, None), "what is not searched is the editor's own"
    written = yaml.safe_load((folder / "editor" / "tuned.yaml").read_text())
    assert written["drift"]["text"] == str(folder / "text.txt"), "the user's own text"
    tuned = Editor(lm, tokenizer, **settings)
    assert tuned.layers == settings["layers"]
    report = tuned.edit(records[:4], evaluate=False)
    assert len(report.edits) == 4
    assert (folder / "editor" / "tuned.html").is_file()
    with pytest.raises(RuntimeError, match="4 edits are in the weights"):
        tuned.tune(records)


@pytest.mark.slow
def test_two_processes_search_together(folder):
    """Each does a part of the trials, and both find the same settings."""
    shared = {"storage": f"sqlite:///{folder / 'shared.db'}", "trials": 3}
    names = ("here", "there")
    started = [
        subprocess.Popen([sys.executable, "-m", "pmet_lightning", *command(folder, name, **shared)], cwd=ROOT)
        for name in names
    ]
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    here, there = (json.loads((folder / name / "tuned.json").read_text()) for name in names)
    assert here["trials"]["settings"] in (3, 4), "the last two may begin at once"
    settings = [yaml.safe_load((folder / name / "tuned.yaml").read_text()) for name in names]
    assert settings[0]["spread"] == settings[1]["spread"]
    assert {**settings[0]["model"], "targets_folder": ""} == {**settings[1]["model"], "targets_folder": ""}
    assert here["reporting"]["score"] == pytest.approx(there["reporting"]["score"], abs=1e-6)
