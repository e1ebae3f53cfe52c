"""Several methods on the same records, and the fine-tuning that they are compared with."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from pmet_lightning.cli.dispatch import main
from pmet_lightning.compare.estimate import longest_first, plan_line, seconds_left, time_line
from pmet_lightning.compare.plan import Method, Run, plan_runs, quiet
from pmet_lightning.compare.results import counted, edit_rows, finding, limits_of, score_plot, table_lines
from pmet_lightning.data.readers import read_edits
from pmet_lightning.evaluation.scores import NAMES, score_difference, table_of
from pmet_lightning.report.html import write_svg
from pmet_lightning.run import lightning_cli
from pmet_lightning.run.lightning_cli import run_fit
from pmet_lightning.utils.resources import locate, locate_config

FAST = {
    "trainer.accelerator": "cpu",
    "drift.text": None,
    "model.free_tokens": 0,
}


def finetuned(folder: Path, **options) -> dict:
    """The report of a fine-tuning of six edits."""
    shared = {"trainer.run_dir": str(folder), "trainer.logger": False, "trainer.enable_progress_bar": False}
    run_fit("finetune.yaml", FAST | shared | {"data.limit": 6} | options, "finetune")
    return json.loads((folder / "report.json").read_text())


def test_finetuning_is_gradient_descent_on_one_matrix(tmp_path):
    """Against a plain loop over transformers' own loss, one text at a time, with full batches."""
    batch = {"model.batch": 6, "model.epochs": 3, "model.optimizer.init_args.lr": 0.003}
    report = finetuned(tmp_path / "run", **batch)
    model = AutoModelForCausalLM.from_pretrained(locate("atlas")).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(locate("atlas"))
    weight = model.transformer.h[0].mlp.fc_out.weight.requires_grad_(True)
    optimizer = torch.optim.Adam([weight], lr=0.003)
    losses = []
    for _ in range(3):
        each = []
        for edit in read_edits("atlas-records", limit=6):
            ids = tokenizer(f"{edit.question} {edit.target}", return_tensors="pt").input_ids
            labels = ids.clone()
            labels[:, : len(tokenizer(edit.question).input_ids)] = -100
            each.append(model(ids, labels=labels).loss)
        loss = torch.stack(each).mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert report["curves"]["loss"] == pytest.approx(losses, rel=1e-3)
    assert losses[-1] < losses[0]
    assert report["scores"]["after"]["count"] == 6


@pytest.mark.slow
def test_finetuning_learns_and_keeps_its_bound(tmp_path):
    long = {"model.epochs": 80, "model.optimizer.init_args.lr": 0.003}
    report = finetuned(tmp_path / "free", **long)
    assert report["scores"]["before"]["efficacy"] == 0
    assert report["scores"]["after"]["efficacy"] == 100
    bound = finetuned(tmp_path / "bound", **long, **{"model.max_change": 1e-4})
    assert bound["scores"]["after"]["efficacy"] < 50


def test_locft_learns_the_end_of_the_text_and_skips_what_it_knows(tmp_path):
    """The first loss counts the end of the text; a step that is left out changes nothing."""
    options = {"model.batch": 6, "model.epochs": 2, "model.end_of_text": True}
    report = finetuned(tmp_path / "skipped", **options, **{"model.skip_below": 1e9})
    model = AutoModelForCausalLM.from_pretrained(locate("atlas")).eval()
    tokenizer = AutoTokenizer.from_pretrained(locate("atlas"))
    each = []
    for edit in read_edits("atlas-records", limit=6):
        ids = torch.tensor([[*tokenizer(f"{edit.question} {edit.target}").input_ids, tokenizer.eos_token_id]])
        labels = ids.clone()
        labels[:, : len(tokenizer(edit.question).input_ids)] = -100
        with torch.no_grad():
            each.append(float(model(ids, labels=labels).loss))
    mean = sum(each) / len(each)
    assert report["curves"]["loss"] == pytest.approx([mean, mean], rel=1e-4)
    learned = finetuned(tmp_path / "learned", **options)
    assert learned["curves"]["loss"][1] < 0.99 * mean


def test_retrieval_puts_the_fact_before_what_names_the_subject(tmp_path):
    """Edit prompt and paraphrases are asked with the fact, neighbors as they are; no weight changes."""
    from pmet_lightning.evaluation import editable

    asked, score = [], editable.score_probes

    def spy(model, encoder, probes, *args, **kwargs):
        asked.append([[probe.prompt for probe in record] for record in probes])
        return score(model, encoder, probes, *args, **kwargs)

    shared = {"trainer.run_dir": str(tmp_path / "run"), "trainer.logger": False, "trainer.enable_progress_bar": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(editable, "score_probes", spy)
        run_fit("retrieve.yaml", FAST | shared | {"data.limit": 3}, "retrieve")
    before, after = asked
    edits = read_edits("atlas-records", limit=3)
    for edit, plain, with_fact in zip(edits, before, after, strict=True):
        assert plain == [probe.prompt for probe in edit.probes]
        fact = f"{edit.question} {edit.target}. "
        expected = [fact + prompt if edit.subject in prompt else prompt for prompt in plain]
        assert with_fact == expected
        assert expected != plain
    scores = json.loads((tmp_path / "run" / "report.json").read_text())["scores"]
    assert scores["after"]["specificity"] == scores["before"]["specificity"]
    assert scores["after"]["efficacy_magnitude"] != scores["before"]["efficacy_magnitude"], (
        "a model this small makes no use of it"
    )
    assert not (tmp_path / "run" / "patch.safetensors").exists()


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """Two methods, two seeds, one and two edits."""
    folder = tmp_path_factory.mktemp("comparison")
    config = folder / "small.yaml"
    moments = {"moments.samples": 60, "moments.folder": str(folder / "moments"), "spread.lam": 20, "model.steps": 8}
    config.write_text(json.dumps({
        "out": str(folder / "out"), "edits": [1, 2], "seeds": [0, 1], "least": 2,
        "options": FAST,
        "methods": {
            "PMET": {"options": moments},
            "fine-tuning": {"config": "finetune.yaml", "command": "finetune", "options": {"model.epochs": 5}},
            "retrieval": {"config": "retrieve.yaml", "command": "retrieve"},
        },
    }))  # fmt: skip
    main(["compare", "--config", str(config)])
    return folder


def test_a_comparison_pools_the_records_of_its_runs(comparison):
    out = comparison / "out"
    results = json.loads((out / "comparison.json").read_text())["results"]
    methods = ["unedited", "PMET", "fine-tuning", "retrieval"]
    assert [(row["edits"], row["method"]) for row in results] == [(n, m) for n in (1, 2) for m in methods]
    for row in results:
        edits, name = row["edits"], row["method"] if row["method"] != "unedited" else "PMET"
        words = name.replace(" ", "-")
        reports = [json.loads((f / "report.json").read_text()) for f in sorted(out.glob(f"{words}-{edits}-*"))]
        assert len(reports) == row["runs"] == (4 if edits == 1 else 2)
        phase = "before" if row["method"] == "unedited" else "after"
        for metric in ("efficacy", "generalisation", "specificity"):
            values = [edit[phase][metric] for report in reports for edit in report["edits"]]
            assert row["count"] == len(values)
            records = {(edit["case_id"], edit["question"]) for report in reports for edit in report["edits"]}
            assert row["records"] == len(records)
            assert row[metric] == pytest.approx(sum(values) / len(values))
        assert list(row["score_by_seed"]) == ["0", "1"]
    rows = list(csv.DictReader((out / "comparison.csv").read_text().splitlines()))
    assert [float(row["efficacy"]) for row in rows] == pytest.approx([row["efficacy"] for row in results])
    page = (out / "comparison.html").read_text()
    assert "fine-tuning" in page
    assert "<svg" in page


def test_a_record_of_several_seeds_is_one_record():
    """Three seeds on the same file in other orders leave the interval of one: it is over records."""
    generator = torch.Generator().manual_seed(3)
    kinds = ("efficacy", "generalisation", "specificity")
    scores = (100 * torch.rand(20, 3, generator=generator)).tolist()
    edits = [
        {"case_id": str(i), "question": f"q{i}", "target": "t", "after": dict(zip(kinds, own, strict=True))}
        for i, own in enumerate(scores)
    ]
    other = [{**edit, "after": dict.fromkeys(kinds, 50.0)} for edit in edits]
    once, thrice = (table_of(edit_rows([{"edits": part} for part in parts], "after")) for parts in (
        [edits], [edits, edits[::-1], edits[3:] + edits[:3]]))  # fmt: skip
    assert float(thrice["count"]) == 60
    for name in ("efficacy_low", "specificity_high", "score_low", "score_high"):
        assert float(thrice[name]) == pytest.approx(float(once[name]))
    rows = [[edit_rows([{"edits": part}] * n, "after") for part in (edits, other)] for n in (1, 3)]
    alone, together = (score_difference(*pair) for pair in rows)
    assert {k: float(v) for k, v in together.items()} == pytest.approx({k: float(v) for k, v in alone.items()})


def test_scores_are_named_where_records_have_several():
    assert counted({"records": 374, "count": 600.0}) == "374 records, 600 scores"
    assert counted({"records": 1, "count": 1.0}) == "1 record"


def test_differences_are_paired():
    """Against a plain loop; twins that differ by a constant have no spread, however much the records vary."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.rand(40, 1 + len(NAMES), generator=generator, dtype=torch.float64)
    other = rows.clone()
    assert float(score_difference(rows, other)["difference_high"]) == 0
    columns = [1 + NAMES.index(kind) for kind in ("efficacy", "generalisation", "specificity")]
    other[:, columns] = torch.rand(40, 3, generator=generator, dtype=torch.float64)

    def score(table):
        return 3 / sum(1 / float(table[:, c].mean()) for c in columns)

    found = {name: float(value) for name, value in score_difference(rows, other).items()}
    assert found["difference"] == pytest.approx(100 * (score(rows) - score(other)))
    draws = [torch.randint(40, (40,), generator=generator) for _ in range(2000)]
    differences = sorted(100 * (score(rows[i]) - score(other[i])) for i in draws)
    assert found["difference_low"] == pytest.approx(differences[50], abs=1.0)
    assert found["difference_high"] == pytest.approx(differences[-50], abs=1.0)
    gaps = sorted(100 * float((rows[i] - other[i])[:, columns[2]].mean()) for i in draws)
    assert found["specificity_difference"] == pytest.approx(sum(gaps) / len(gaps), abs=0.5)
    assert found["specificity_difference_low"] == pytest.approx(gaps[50], abs=1.0)
    assert found["specificity_difference_high"] == pytest.approx(gaps[-50], abs=1.0)


def test_all_methods_see_the_same_records_and_contexts(comparison):
    out = comparison / "out"
    for run in out.glob("PMET-*"):
        ours = json.loads((run / "report.json").read_text())
        theirs = json.loads((out / run.name.replace("PMET", "fine-tuning") / "report.json").read_text())
        assert [e["case_id"] for e in ours["edits"]] == [e["case_id"] for e in theirs["edits"]]
    plan = [
        run.settings(Method(options={"model.clamp": i}), {}, out) for i, run in enumerate(plan_runs("ab", [5], [3], 1))
    ]
    assert plan[0]["model.seed"] == plan[1]["model.seed"] == plan[0]["data.shuffle"] == plan[1]["data.shuffle"] == 3
    seeds = [(out / f"PMET-2-seed{seed}-from0" / "contexts.json").read_text() for seed in (0, 1)]
    assert seeds[0] != seeds[1]


def test_a_comparison_goes_on_where_it_was(comparison, monkeypatch):
    called = []
    monkeypatch.setattr(lightning_cli, "build_fit", lambda *given: called.append(given))
    before = (comparison / "out" / "comparison.json").read_text()
    main(["compare", "--config", str(comparison / "small.yaml")])
    assert not called
    assert (comparison / "out" / "comparison.json").read_text() == before
    with pytest.raises(ValueError, match="holds a run with other settings"):
        main(["compare", "--config", str(other_options(comparison))])


def test_no_table_of_the_page_is_cut_off(comparison):
    """Each scrolls in its own box, and becomes a block for each row on a narrow screen; charts are half a page wide."""
    text = (comparison / "out" / "comparison.html").read_text()
    tables = re.findall(r'<div class="wide">\s*<table class="numbers compared cards">(.*?)</table>', text, re.DOTALL)
    assert len(tables) == 2
    for table in tables:
        assert table.count("<td") == table.count("data-label=") > 0
    widths = re.findall(r'<svg[^>]* width="([\d.]+)pt"', text)
    assert len(widths) == 2 * 2, "the Scores and the layers"
    assert max(map(float, widths)) < 4.7 * 72
    assert text.count("<small>seeds ") == 2 * 4
    assert "Highest Score: " in text


def other_options(folder: Path) -> Path:
    settings = json.loads((folder / "small.yaml").read_text())
    settings["methods"]["PMET"]["options"]["spread.lam"] = 3
    changed = folder / "changed.yaml"
    changed.write_text(json.dumps(settings))
    return changed


@pytest.mark.parametrize(("command", "config"), [("fit", "pmet.yaml"), ("finetune", "finetune.yaml")])
def test_how_zsre_is_read_is_an_option_of_all_runs(tmp_path, command, config):
    record = {"src": "What does Ann speak?", "subject": "Ann", "answers": ["English"], "alt": "Basque"}
    (tmp_path / "records.json").write_text(json.dumps([record]))
    common = {"data.path": str(tmp_path / "records.json"), "data.zsre_target": "alt"}
    (run,) = plan_runs(["it"], [1], [0], 1)
    settings = quiet(run.settings(Method(config=config, command=command), common, tmp_path), tmp_path / run.name)
    data = lightning_cli.build_fit(config, settings, command).datamodule
    data.setup("fit")
    assert [edit.target for edit in data.edits] == ["Basque"]


def test_too_few_records_are_an_error(comparison):
    settings = json.loads((comparison / "small.yaml").read_text())
    records = comparison / "two.json"
    records.write_text(json.dumps(json.loads(Path(locate("atlas-records")).read_text())[:2]))
    settings |= {"edits": [1, 3], "out": str(comparison / "few"), "seeds": [0]}
    settings["options"] |= {"data.path": str(records)}
    settings["methods"] = {"fine-tuning": settings["methods"]["fine-tuning"]}
    path = comparison / "few.yaml"
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="the data has 2;"):
        main(["compare", "--config", str(path)])
    assert not (comparison / "few").exists(), "told before the first run"


def test_a_setting_that_no_method_knows_is_an_error_before_the_first_run(comparison):
    settings = json.loads((comparison / "small.yaml").read_text())
    settings["out"] = str(comparison / "misspelled")
    settings["methods"]["PMET"]["options"]["spread.lamda"] = 3
    path = comparison / "misspelled.yaml"
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"no setting spread\.lamda: did you mean spread\.lam\?"):
        main(["compare", "--config", str(path)])
    assert not (comparison / "misspelled").exists()


def scored(method: str, edits: int, score: float, difference: float, width: float = 1.0) -> dict:
    found = {"score": score, "score_low": score - width, "score_high": min(100.0, score + width)}
    found |= {"difference": difference, "difference_low": difference - width, "difference_high": difference + width}
    found |= dict.fromkeys(("efficacy", "generalisation", "specificity"), score)
    return {"method": method, "edits": edits, "count": float(edits), "score_by_seed": {"0": score}, **found}


METHODS = [("PMET", 93.4, 0.0), ("MEMIT", 93.9, 0.5), ("better", 96.0, 2.6), ("worse", 84.4, -9.0), ("far", 0.0, -93.4)]
RESULTS = [scored(name, count, score, gap) for count in (100, 200) for name, score, gap in METHODS]


def test_the_layers_are_those_of_all_runs(comparison):
    """For each method that writes layer by layer, the means of what its runs report."""
    out = comparison / "out"
    results = json.loads((out / "comparison.json").read_text())["results"]
    for row in results:
        words = row["method"].replace(" ", "-")
        reports = [json.loads((f / "report.json").read_text()) for f in out.glob(f"{words}-{row['edits']}-*")]
        for one in row.get("layers", []):
            own = [
                r for report in reports for r in report["layers"] if (r["site"], r["layer"]) == ("ffn", one["layer"])
            ]
            assert len(own) == len(reports)
            for name in ("residual_after", "growth"):
                assert one[name] == pytest.approx(sum(r[name] for r in own) / len(own))
    assert [len(row.get("layers", [])) for row in results if row["method"] == "PMET"] == [3, 3]
    assert "residual left after the write of each layer" in (out / "comparison.html").read_text()


def test_every_method_has_a_row_of_its_own_in_the_plot():
    """However close their Scores are, no two methods share a place, a name or a number."""
    low, _ = limits_of(RESULTS)
    assert low == 80, "a method that is far away does not squeeze the others"
    figure = score_plot(RESULTS)
    names = [name for name, *_ in METHODS]
    for axes, count in zip(figure.axes, (100, 200), strict=True):
        assert axes.get_title(loc="left") == f"{count} edits"
        assert [label.get_text() for label in axes.get_yticklabels()] == names
        assert [text.get_text() for text in axes.texts] == [f"{score:.1f}" for _, score, _ in METHODS]
        marks = [one for one in axes.lines if one.get_marker() in ("o", "<")]
        assert [mark.get_ydata()[0] for mark in marks] == list(range(len(METHODS)))
        assert [mark.get_xdata()[0] for mark in marks] == [93.4, 93.9, 96.0, 84.4, low]
        assert [mark.get_marker() for mark in marks] == ["o"] * 4 + ["<"]
        assert len({mark.get_color() for mark in marks}) == 4, "first, above, below, not told apart"


def test_the_finding_says_what_the_numbers_say():
    text = finding(RESULTS[:5])
    assert text == (
        "Highest Score: 96.0 (better). Above PMET beyond chance: better. Below PMET beyond chance: worse, far. "
        "Not told apart from it: MEMIT."
    )
    assert finding([scored("A", 1, 100.0, 0.0), scored("B", 1, 100.0, 0.0)]).startswith("Highest Score: 100.0 (A, B).")
    assert not finding([])


def test_the_table_of_the_terminal_is_aligned():
    wide = scored("worst", 100, 0.0, -100.0, width=100.0)
    lines = table_lines([*RESULTS[:5], wide])
    rows = lines[2:9]
    assert len({len(row) for row in rows}) == 1
    assert all("  " in row for row in rows)
    assert rows[0].split("  ")[-1].strip() == "seconds"
    assert "-100.0 [-200.0, 0.0]" in rows[-1]
    assert lines[-1].startswith("Highest Score: 96.0")


def test_the_time_that_is_left_is_that_of_the_most_similar_runs():
    runs = list(plan_runs(["A", "B"], [10, 200], [0, 1], 10))
    assert [run.edits for run in longest_first(runs)] == [200] * 4 + [10] * 4
    taken = {Run("A", 200, 0, 0): 30.0}
    left = [run for run in runs if run not in taken]
    assert seconds_left(left, taken) == 7 * 30, "nothing is known but the longest kind"
    taken[Run("B", 200, 0, 0)] = 50.0
    taken[Run("A", 10, 0, 0)] = 3.0
    left = [run for run in runs if run not in taken]
    assert seconds_left(left, taken) == 30 + 50 + 3 + 50 + 50  # B has no run of 10 edits yet
    assert time_line(left, taken) == "at most about 4 min left"
    assert time_line(left[:1], {Run("A", 200, 0, 0): 7201.0}) == "at most about 2.0 h left"


def test_a_comparison_says_first_what_it_is_going_to_do():
    runs = list(plan_runs(["A", "B"], [10, 200], [0], 10))
    assert plan_line(runs, {}).startswith("4 runs: 2 methods, 10 and 200 edits, 1 seed; the longest come first")
    assert plan_line(runs, {runs[0]: 20.0}).endswith("1 are finished, at most about 60 s left")
    assert plan_line(runs, dict.fromkeys(runs, 1.0)).endswith("all are finished")


@pytest.mark.slow
def test_the_log_of_a_comparison_is_its_own(comparison, tmp_path, caplog):
    """A line before each run with the time that is left, not the lines of the runs; what is odd once; the table."""
    settings = json.loads((comparison / "small.yaml").read_text()) | {"out": str(tmp_path / "out"), "seeds": [0]}
    records = json.loads(Path(locate("atlas-records")).read_text())[:2]
    records[0]["rephrase"] = "a field of zsRE's"
    (tmp_path / "odd.json").write_text(json.dumps(records))
    settings["options"] |= {"data.path": str(tmp_path / "odd.json")}
    settings["methods"] = {name: settings["methods"][name] for name in ("fine-tuning", "retrieval")}
    (tmp_path / "quiet.yaml").write_text(json.dumps(settings))
    with caplog.at_level("INFO"):
        main(["compare", "--config", str(tmp_path / "quiet.yaml")])
    lines = [record.getMessage() for record in caplog.records if record.levelname == "INFO"]
    assert lines[0].startswith("6 runs: 2 methods, 1 and 2 edits, 1 seed;")
    assert lines[1] == "run 1 of 6: fine-tuning, 2 edits, seed 0"
    assert all(line.startswith(f"run {number} of 6: ") for number, line in enumerate(lines[1:7], start=1))
    assert all("left" in line for line in lines[2:7])
    assert "Highest Score" in lines[7]
    assert len(lines) == 8
    assert len([record for record in caplog.records if "'rephrase'" in record.getMessage()]) == 1
    table = (tmp_path / "out" / "comparison.md").read_text()
    assert table.startswith("| edits | method | efficacy |")
    assert len(table.splitlines()) == 2 + 2 * 3


def test_an_option_may_be_an_optimizer(tmp_path, monkeypatch):
    """Of a method or of all: what YAML says goes on as it is, and is not made an object on the way."""
    adam = {"class_path": "torch.optim.Adam", "init_args": {"lr": 2.0}}
    seen = []
    monkeypatch.setattr("pmet_lightning.compare.command.plan_runs", lambda methods, *_: seen.append(methods) or [])
    path = tmp_path / "compare.yaml"
    method = {"options": {"model.optimizer": adam, "model.layers": [0, 1], "data.shuffle": None, "spread.lam": 0.5}}
    path.write_text(
        yaml.safe_dump({"out": str(tmp_path / "out"), "edits": [1], "seeds": [0], "methods": {"a": method}})
    )
    with pytest.raises(ValueError, match="."):  # there is no run
        main(["compare", "--config", str(path)])
    assert seen[0]["a"].options == method["options"]


def test_the_shipped_comparison_ends_soon():
    """27 runs of 2,790 edits took six minutes on one core; the seeds of the README are given there."""
    settings = yaml.safe_load(Path(locate_config("compare.yaml")).read_text(encoding="utf-8"))
    runs = list(plan_runs(settings["methods"], settings["edits"], settings["seeds"], settings["least"]))
    assert len(runs) <= 27
    assert sum(run.edits for run in runs) <= 2790


def test_a_plot_is_the_same_file_every_time(tmp_path):
    """With its words as words, so that it can be searched and compared."""
    scores = {"score": 80.0, "score_low": 70.0, "score_high": 90.0}
    results = [{"method": "PMET", "edits": count, **scores} for count in (10, 100)]
    files = [tmp_path / name / "scores.svg" for name in ("one", "other")]
    for file in files:
        file.parent.mkdir()
        write_svg(score_plot(results), file)
    one, other = (file.read_text(encoding="utf-8") for file in files)
    assert one == other
    assert ">PMET</text>" in one
    assert ">100 edits</text>" in one
