"""What a run shows in TensorBoard: every promised tag, against the run's files and plain computations of our own."""

from __future__ import annotations

import csv
import errno
import heapq
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.metadata import EXPERIMENT_TAG, SESSION_END_INFO_TAG, SESSION_START_INFO_TAG
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard import SummaryWriter

from pmet_lightning.cli.dispatch import main
from pmet_lightning.data.encoder import load_tokenizer
from pmet_lightning.data.records import parse_record
from pmet_lightning.evaluation.scores import METRICS
from pmet_lightning.model.architectures import architecture_of
from pmet_lightning.model.loading import load_config, load_model
from pmet_lightning.model.projections import Sites, add_to_weight
from pmet_lightning.report.logged_metrics import is_shown
from pmet_lightning.run.lightning_cli import build_fit
from pmet_lightning.run.recorder import RunRecorder
from pmet_lightning.run.tensorboard import TensorBoardCallback
from pmet_lightning.solver.cholesky import condition_bound
from pmet_lightning.utils.distributed import ProcessGroup
from pmet_lightning.utils.resources import locate
from pmet_lightning.write.residual import ResidualTracker
from tests.conftest import ROOT
from tests.harness import as_overrides, edit
from tests.plain import plain_record
from tests.targets.test_target_optimizer import moments_for, tiny_module
from tests.tiny import RECORDS, save_tiny

STEPS, CLAMP, LAYERS, MOST_IN_FLIGHT = 5, 0.6, (1, 2), 3
# Weights of all parts of the loss, limits: with them, everything is shown.
EVERYTHING = (
    "--model.kl_factor", "0.1", "--model.norm_factor", "0.02", "--model.optimizer.init_args.lr", "0.05",
    "--model.loss_tolerance", "7.9", "--model.micro_batch", str(MOST_IN_FLIGHT), "--drift.max_growth", "1e9",
    "--drift.max_perplexity", "1e9",
)  # fmt: skip
SIZES = (4, 3)  # edits of each edit batch
DOCS = (ROOT / "docs" / "tensorboard.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tiny model, and seven records with all kinds of questions."""
    base = tmp_path_factory.mktemp("inputs")
    records = json.loads(Path(locate("atlas-records")).read_text())[: sum(SIZES)]
    (base / "records.json").write_text(json.dumps(records))
    (base / "records.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    (base / "corpus.txt").write_text("\n".join(f"This is the text of number {i}, and it is short." for i in range(40)))
    return save_tiny("gptj", base / "model"), base


def options(inputs, folder: Path, *arguments: str, records: str = "records.json", command: str = "fit") -> list[str]:
    """What follows the command."""
    model, base = inputs
    config = "pmet.yaml" if command == "fit" else "finetune.yaml"
    moments = ["--moments.corpus", str(base / "corpus.txt"), "--moments.folder", str(base / "moments")]
    own = ["--model.steps", str(STEPS), "--model.clamp", str(CLAMP), "--spread.lam", "2", *moments]
    return [
        "--config", config, "--trainer.run_dir", str(folder), "--trainer.accelerator", "cpu",
        "--trainer.enable_progress_bar", "false", "--model.model_name", model, "--model.layers", json.dumps(LAYERS),
        "--data.path", str(base / records), "--data.edit_batch", str(SIZES[0]), "--drift.text",
        str(base / "corpus.txt"), *(own if command == "fit" else []), *arguments,
    ]  # fmt: skip


def fit(inputs, folder: Path, *arguments: str, command: str = "fit", **kwargs) -> Path:
    main([command, *options(inputs, folder, *arguments, command=command, **kwargs)])
    return folder


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    """A run with everything that is shown, in two edit batches."""
    return fit(inputs, tmp_path_factory.mktemp("run") / "out", *EVERYTHING)


def events_of(folder: Path) -> EventAccumulator:
    (path,) = folder.glob("events.out.tfevents*")
    found = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0, "histograms": 0})
    return found.Reload()


@pytest.fixture(scope="module")
def events(run):
    return events_of(run)


@pytest.fixture(scope="module")
def ledger(run):
    return ledger_of(run)


def ledger_of(run: Path) -> list[list[dict]]:
    """Lines of the edits of each edit batch."""
    lines = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    return [[line for line in lines if line["edit_batch"] == number] for number in range(len(SIZES))]


def values(events: EventAccumulator, tag: str) -> list[float]:
    return [point.value for point in events.Scalars(tag)]


def steps(events: EventAccumulator, tag: str) -> list[int]:
    return [point.step for point in events.Scalars(tag)]


def promised(scores: dict, written=("ffn",), optimized=("attn", "ffn")) -> dict[str, str]:
    """Every tag of the table in docs/tensorboard.md, and what its step is.

    Args:
        scores: Of the run.
        written: Sites that it writes.
        optimized: Sites that have a delta.
    """
    main_scores = {*METRICS, "perplexity", "kl"}
    by_score = (*(f"relations_{name}" for name in ("efficacy", "specificity")), *(f"forgetting_{m}" for m in METRICS))
    names = {
        "metric": METRICS,
        "part": ("loss", "loss_nll", "loss_kl", "loss_norm", "p", "p_prompt"),
        "level": ("q10", "q50", "q90"),
        "site": written,
        "optimized": optimized,
        "place": [f"{site}_layer_{layer}" for site in written for layer in LAYERS],
        "figure": ("loss", "probability", "steps", "stop_reasons", "residual", "norms", *by_score),
        "detail": [name for name in scores["after"] if name not in main_scores],
        "score": list(scores["before"]),
        "live": ("loss", "loss_nll", "loss_kl", "loss_norm", "p", "p_prompt", "active_edits"),
    }
    tags: dict[str, str] = {}
    for cells in re.findall(r"^\| (`.*?`) \| (\w+) \| .*\|$", DOCS, re.MULTILINE):
        for pattern in re.findall(r"`([^`]+)`", cells[0]):
            found = [pattern]
            for name in re.findall(r"\{(\w+)\}", pattern):
                found = [tag.replace(f"{{{name}}}", value) for tag in found for value in names[name]]
            tags |= dict.fromkeys(found, cells[1])
    return tags


def test_every_promised_tag_and_no_other(run, events):
    check_tags(events, promised(json.loads((run / "scores.json").read_text())))


def check_tags(events: EventAccumulator, tags: dict[str, str]) -> None:
    shown = events.Tags()
    texts = {tag.removesuffix("/text_summary") for tag in shown["tensors"]} - {"custom_scalars__config__"}
    assert set(tags) == {*shown["scalars"], *shown["images"], *shown["histograms"], *texts}
    assert {tag for tag in tags if tag.startswith("6_")} == set(shown["images"])
    assert {tag for tag in tags if tag.startswith("7_")} == set(shown["histograms"])
    assert texts == {"answers", "scores"}


def looks(lines: list[dict]) -> int:
    """Steps until the last of the edits of an edit batch has stopped, when as many as fly are taken up in turn.

    On a CPU each step is looked at.
    """
    rounds = -(-len(lines) // MOST_IN_FLIGHT)
    free_from = [0] * -(-len(lines) // rounds)
    for line in lines:
        heapq.heapreplace(free_from, free_from[0] + line["steps"])
    return max(free_from)


def test_every_tag_is_finite_and_has_its_points(run, events, ledger):
    check_points(events, promised(json.loads((run / "scores.json").read_text())), ledger)


@pytest.mark.parametrize(
    ("option", "sites"),
    [
        (("--spread.write", "attn+ffn"), {"written": ("attn", "ffn")}),
        (("--model.optimize", "hidden"), {"optimized": ("hidden",)}),
    ],
    ids=["attn+ffn written", "hidden optimized"],
)
def test_the_family_shows_its_own(inputs, tmp_path, option, sites):
    choice = ("--data.skip", "0", "--data.limit", str(sum(SIZES)), "--data.shuffle", "3")
    folder = fit(inputs, tmp_path / "out", *EVERYTHING, *choice, *option)
    found, tags = events_of(folder), promised(json.loads((folder / "scores.json").read_text()), **sites)
    check_tags(found, tags)
    check_points(found, tags, ledger_of(folder))
    start = plugin_data(found, SESSION_START_INFO_TAG).session_start_info.hparams
    assert [start[f"data.{name}"].number_value for name in ("skip", "limit", "shuffle")] == [0, sum(SIZES), 3]


def check_points(events: EventAccumulator, tags: dict[str, str], ledger: list[list[dict]]) -> None:
    taken = [max(line["steps"] for line in lines) for lines in ledger]
    places = {
        "batch": [0, 1],
        "edits": [sum(SIZES)],
        "step": [number * STEPS + step for number, most in enumerate(taken) for step in range(most)],
        "write": list(range(2 * len(LAYERS))),
        "look": list(range(sum(map(looks, ledger)))),
    }
    for tag, kind in tags.items():
        if tag in events.Tags()["scalars"]:
            assert all(map(math.isfinite, values(events, tag))), tag
            assert steps(events, tag) == ([0] if tag.startswith("9_before/") else places[kind]), tag
    assert sum(values(events, "9_live/active_edits")) == sum(line["steps"] for lines in ledger for line in lines)
    for tag in events.Tags()["images"]:
        assert [point.step for point in events.Images(tag)] == [sum(SIZES)], tag
    for tag in events.Tags()["histograms"]:
        assert [point.step for point in events.Histograms(tag)] == [0, 1]
        for point, lines in zip(events.Histograms(tag), ledger, strict=True):
            found = point.histogram_value
            numbers = [found.min, found.max, found.sum, found.sum_squares, *found.bucket_limit, *found.bucket]
            assert all(map(math.isfinite, numbers)), tag
            each = found.num if "/target_" in tag else len(lines)  # entries of vectors, or a number for every edit
            assert found.num == sum(found.bucket) == each, tag
    assert [point.step for point in events.Tensors("answers/text_summary")] == [0, 1]


def test_scores_are_those_of_the_run(run, events):
    scores = json.loads((run / "scores.json").read_text())
    for name in METRICS:
        # One point in a chart: TensorBoard's smoothing of two would show the second one where it is not.
        assert values(events, f"9_before/{name}") == pytest.approx([scores["before"][name]])
        assert values(events, f"1_scores/{name}") == pytest.approx([scores["after"][name]])
        at_once = [batch["at_once"][name] for batch in scores["edit_batches"]]
        assert values(events, f"3_edit_batches/at_once_{name}") == pytest.approx(at_once)
    assert values(events, "1_scores/kl") == pytest.approx([scores["after"]["kl"]])
    assert values(events, "9_details/count") == values(events, "9_before/count") == [7]
    (point,) = events.Tensors("scores/text_summary")
    assert f"{scores['after']['score']:.1f} [" in point.tensor_proto.string_val[0].decode()
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    written = [float(row["1_scores/score"]) for row in rows if row.get("1_scores/score")]
    assert written == pytest.approx(values(events, "1_scores/score"))


def test_curves_by_step_end_where_the_ledger_does(run, events, ledger):
    """What stopped keeps its last value, so that the last point of a batch is over all of its edits."""
    points = {tag: dict(zip(steps(events, tag), values(events, tag), strict=True)) for tag in events.Tags()["scalars"]}
    curves = json.loads((run / "report.json").read_text())["curves"]
    assert points["9_active/active_edits"] == dict(zip(points["2_targets/p"], curves["active_edits"], strict=True))
    assert values(events, "2_targets/loss_kl") == pytest.approx(curves["loss_kl"], rel=1e-5)
    names = {**{part: part for part in ("loss", "loss_nll", "loss_kl", "loss_norm")}, "p": "p_after"}
    for number, lines in enumerate(ledger):
        last = number * STEPS + max(line["steps"] for line in lines) - 1
        for name, field in names.items():
            ends = [line[field] for line in lines]
            assert points[f"2_targets/{name}"][last] == pytest.approx(np.mean(ends), rel=1e-5)
            for level in (10, 50, 90):
                expected = np.percentile(ends, level)
                assert points[f"9_quantiles/{name}_q{level}"][last] == pytest.approx(expected, rel=1e-5)
        assert points["2_targets/p"][number * STEPS] == pytest.approx(np.mean([line["p_before"] for line in lines]))
        for step in range(last - number * STEPS + 1):
            done = sum(line["steps"] <= step + 1 for line in lines) / len(lines)
            assert points["2_targets/finished"][number * STEPS + step] == pytest.approx(done)
    assert len({line["steps"] for lines in ledger for line in lines}) > 1, "all edits take as many steps: nothing shown"


def test_edit_batches_are_what_the_ledger_says(run, events, ledger):
    for number, lines in enumerate(ledger):

        def at(name, number=number):
            return values(events, f"3_edit_batches/{name}")[number]

        for reason in ("loss", "argmax", "steps"):
            share = sum(line["stop_reason"] == reason for line in lines) / len(lines)
            assert at(f"stopped_by_{reason}") == pytest.approx(share)
        for name in ("steps", "p_before", "p_after", "delta_attn", "delta_ffn"):
            assert at(name) == pytest.approx(np.mean([line[name] for line in lines]), rel=1e-5)
        for site in ("attn", "ffn"):
            touching = [abs(line[f"delta_{site}"] / CLAMP - 1) <= 1e-4 for line in lines]
            assert at(f"clamped_{site}") == pytest.approx(np.mean(touching))
        assert at("residual_left") == pytest.approx(np.mean(lefts(lines)))
    assert max(values(events, "3_edit_batches/clamped_ffn")) > 0, "no delta touches its clamp: nothing shown"


def lefts(lines: list[dict]) -> list[float]:
    """What is left of the residuals of the edits that had one: one stops at its first step."""
    return [line["residual_left"] for line in lines if line["steps"] > 1]


def test_speeds_are_those_of_the_phases(run, events):
    phases = json.loads((run / "report.json").read_text())["phases"]
    for name in ("targets", "spread"):
        rates = values(events, f"3_edit_batches/edits_per_second_{name}")
        seconds = sum(size / rate for size, rate in zip(SIZES, rates, strict=True))
        assert seconds == pytest.approx(phases[name], rel=0.01, abs=0.002)
        for whole, part in zip(values(events, "3_edit_batches/edits_per_second"), rates, strict=True):
            assert 0 < whole < part


def test_writes_are_those_of_the_report(run, events, ledger):
    lines = json.loads((run / "report.json").read_text())["layers"]
    for name in ("residual_after", "overshoot", "norm_ratio", "growth"):
        expected = [line[name] for line in lines]
        assert values(events, f"4_writes/{name}_ffn") == pytest.approx(expected)
        for i, layer in enumerate(LAYERS):
            assert values(events, f"5_layers/{name}/ffn_layer_{layer}") == pytest.approx(expected[i :: len(LAYERS)])
    for number, (first, last) in enumerate(zip(lines[::2], lines[1::2], strict=True)):
        assert first["residual_after"] == pytest.approx(last["residual"])
        assert last["residual_after"] == pytest.approx(np.mean(lefts(ledger[number])))
    for layer in LAYERS:
        place = f"ffn_layer_{layer}"
        expected = [[line["solve_error"][f"ffn/layer_{layer}"] for line in lines][0] for lines in ledger]
        assert values(events, f"8_numerics/solve_error/{place}") == pytest.approx(expected)
        assert min(values(events, f"8_numerics/condition_bound/{place}")) >= 1


def test_texts_before_and_after(inputs, events, ledger):
    """The answers after are the ledger's; those before are what transformers says by itself, one prompt at a time."""
    shown = [point.tensor_proto.string_val[0].decode() for point in events.Tensors("answers/text_summary")]
    for text, lines in zip(shown, ledger, strict=True):
        head, rule, *rows = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in text.splitlines()]
        assert head == ["question", "was", "target", "says before", "says after"]
        assert set(rule) == {"---"}
        assert len(rows) == len(lines)
        for row, line in zip(rows, lines, strict=True):
            question = line["prompt"].replace("{}", line["subject"])
            assert row[:3] == [question, line["target_true"], line["target"]]
            assert row[4] == " ".join(line["answer"].split())
    model, tokenizer = load_model(inputs[0], "float32"), load_tokenizer(inputs[0])
    for row in shown[0].splitlines()[2:]:
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        given = tokenizer(cells[0], return_tensors="pt").input_ids
        said = model.generate(given, max_new_tokens=16, do_sample=False, pad_token_id=0)[0, given.shape[1] :]
        assert cells[3] == " ".join(tokenizer.decode(said, skip_special_tokens=True).split())


def plugin_data(events: EventAccumulator, tag: str) -> HParamsPluginData:
    return HParamsPluginData.FromString(events.SummaryMetadata(tag).plugin_data.content)


def test_settings_and_scores_in_the_hparams_tab(run, events):
    start = plugin_data(events, SESSION_START_INFO_TAG).session_start_info.hparams
    assert start["model.clamp"].number_value == CLAMP
    assert start["model.steps"].number_value == STEPS
    assert start["model.layers"].string_value == str(list(LAYERS))
    assert start["spread.lam"].number_value == 2
    assert start["spread.rule"].string_value == "sqrt"
    assert start["data.edit_batch"].number_value == SIZES[0]
    assert start["model.lr"].number_value == 0.05
    assert (start["model.dtype"].string_value, start["model.chat"].bool_value) == ("float32", False)
    assert start["model.keep_float32"].bool_value is False
    assert [start[f"model.context_{name}"].number_value for name in ("count", "length")] == [3, 6]
    assert start["moments.corpus"].string_value.endswith("corpus.txt")
    assert start["moments.samples"].string_value == "auto"
    assert start["moments.length"].number_value == 128
    assert start["data.skip"].number_value == 0
    assert not {"data.limit", "data.shuffle"} & set(start), "null is left out"
    assert start["drift.max_growth"].number_value == 1e9
    experiment = plugin_data(events, EXPERIMENT_TAG).experiment
    assert {info.name for info in experiment.hparam_infos} == set(start)
    metrics = [info.name.tag for info in experiment.metric_infos]
    assert metrics == [f"1_scores/{name}" for name in ("score", "specificity", "generalisation", "efficacy")]
    assert set(metrics) <= set(events.Tags()["scalars"])
    assert plugin_data(events, SESSION_END_INFO_TAG).session_end_info.status == 1, "not STATUS_SUCCESS"
    assert not [path for path in run.iterdir() if path.is_dir()], "a session beside the run"
    assert "!!python" not in (run / "hparams.yaml").read_text()


def test_custom_charts_name_tags_that_exist(events):
    (point,) = events.Tensors("custom_scalars__config__")
    charts = [c for g in layout_pb2.Layout.FromString(point.tensor_proto.string_val[0]).category for c in g.chart]
    wanted = [tag for chart in charts for tag in chart.multiline.tag]
    wanted += [t for chart in charts for s in chart.margin.series for t in (s.value, s.lower, s.upper)]
    assert len(wanted) > 15
    for pattern in wanted:
        assert any(re.fullmatch(pattern, tag) for tag in events.Tags()["scalars"]), pattern


def test_nothing_is_shown_without_a_logger(inputs, tmp_path):
    folder = fit(inputs, tmp_path / "out", "--trainer.logger", "false", "--data.limit", "2")
    assert json.loads((folder / "state.json").read_text())["status"] == "finished"
    assert not [path for path in folder.iterdir() if "tfevents" in path.name or path.name == "metrics.csv"]


def test_a_stream_is_shown_to_its_end_and_goes_on(inputs, tmp_path):
    arguments = ["--data.stream", "true", "--data.edit_batch", "3", "--trainer.resume", "true"]
    lines = (inputs[1] / "records.jsonl").read_text().splitlines(keepends=True)
    source = inputs[1] / "growing.jsonl"
    source.write_text("".join(lines[:3]))
    folder = fit(inputs, tmp_path / "out", *arguments, records="growing.jsonl")
    first = events_of(folder)
    (path,) = folder.glob("events.out.tfevents*")
    path.rename(tmp_path / "first")
    source.write_text("".join(lines))
    fit(inputs, folder, *arguments, records="growing.jsonl")
    second = events_of(folder)
    assert [steps(found, "3_edit_batches/steps") for found in (first, second)] == [[0], [1, 2]]
    assert [steps(found, "1_scores/score") for found in (first, second)] == [[3], [7]]
    assert steps(second, "2_targets/loss")[0] == STEPS
    assert [point.step for point in second.Tensors("answers/text_summary")] == [1, 2]


def test_the_baseline_is_shown_too(inputs, ledger, tmp_path):
    """Its first epoch is before its first step: P(o*) is what the other run's ledger has for the unedited model."""
    arguments = ["--model.layers", "[2]", "--model.epochs", "3", "--data.edit_batch", "null", "--data.limit", "4"]
    found = events_of(fit(inputs, tmp_path / "out", *arguments, command="finetune"))
    assert {tag for tag in found.Tags()["scalars"] if tag[0] == "2"} == {"2_finetuning/loss", "2_finetuning/p"}
    assert steps(found, "2_finetuning/loss") == steps(found, "2_finetuning/p") == [0, 1, 2]
    clean = np.array([line["p_prompt_before"] for line in ledger[0]])
    assert values(found, "2_finetuning/p")[0] == pytest.approx(clean.mean(), rel=1e-4)
    assert values(found, "2_finetuning/loss")[0] == pytest.approx(-np.log(clean).mean(), rel=1e-4)
    assert values(found, "2_finetuning/p")[-1] > values(found, "2_finetuning/p")[0]
    assert steps(found, "9_before/efficacy") == [0]
    assert steps(found, "1_scores/efficacy") == [4]
    assert plugin_data(found, SESSION_START_INFO_TAG).session_start_info.hparams["model.epochs"].number_value == 3


class Watcher(L.Callback):
    """Reads the run folder as somebody does who looks at it between two edit batches."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1:
            self.events = events_of(trainer.run_dir)
            self.rows = list(csv.DictReader((trainer.run_dir / "metrics.csv").read_text().splitlines()))


def test_a_run_can_be_watched_while_it_goes_on(inputs, tmp_path):
    config, *arguments = options(inputs, tmp_path / "out")[1:]
    cli = build_fit(config, as_overrides(arguments))
    watcher = Watcher()
    cli.trainer.callbacks.append(watcher)
    cli.trainer.fit(cli.model, cli.datamodule)
    found = watcher.events
    assert steps(found, "9_before/score") == [0]
    assert steps(found, "3_edit_batches/steps") == [0]
    assert steps(found, "4_writes/growth_ffn") == [0, 1]
    assert [point.step for point in found.Tensors("answers/text_summary")] == [0]
    looks = steps(found, "9_live/loss")
    assert looks == list(range(len(looks)))
    for tag in ("9_live/loss", "2_targets/loss", "3_edit_batches/steps", "9_before/score"):
        kept = [(float(row[tag]), int(row["step"])) for row in watcher.rows if row.get(tag)]
        assert [value for value, _ in kept] == pytest.approx(values(found, tag), rel=1e-5)
        assert [step for _, step in kept] == steps(found, tag)
    assert len(steps(events_of(tmp_path / "out"), "9_live/loss")) > len(looks)
    board = next(logger for logger in cli.trainer.loggers if isinstance(logger, TensorBoardLogger))
    assert SummaryWriter(str(tmp_path / "other"), **board._kwargs).flush_secs == 5


class Kept:
    """A logger that keeps what it is given."""

    def __init__(self):
        self.points = {}

    def log_metrics(self, points, step):
        self.points[step] = points


def test_numbers_that_are_not_finite_are_left_out_with_a_word(caplog):
    logger, inspection = Kept(), TensorBoardCallback(RunRecorder(Path("none")))
    trainer = SimpleNamespace(loggers=[logger], is_global_zero=True)
    for step in range(3):
        inspection._log(trainer, {"a": 1.0, "b": math.nan if step else 2.0, "c": math.inf if step else 3.0}, step)
    assert logger.points == {0: {"a": 1.0, "b": 2.0, "c": 3.0}, 1: {"a": 1.0}, 2: {"a": 1.0}}
    assert len(caplog.messages) == 1
    assert re.search(r"not finite.*: b \(nan\), c \(inf\) at step 1", caplog.text)


def test_of_thousands_of_edit_batches_few_keep_curves():
    kept = [number for number in range(10_000) if is_shown(number)]
    assert kept[:20] == [*range(10), *range(10, 101, 10), 200][:20]
    assert len(kept) == 10 + 9 * 3


@pytest.mark.parametrize(
    ("family", "write", "optimize"),
    [("gptj", "ffn", "attn+ffn"), ("gpt2", "attn+ffn", "attn+ffn"), ("llama", "ffn", "hidden"),
     ("gemma2", "ffn", "attn+ffn")],
)  # fmt: skip
def test_overshoot_and_residual_by_whole_passes(family, write, optimize, tmp_path):
    """Each write is added to a fresh model, and the states are read there, one prompt at a time."""
    folder = save_tiny(family, tmp_path / "model")
    dtype = "float32" if family == "gemma2" else "float64"
    module = tiny_module(folder, optimize=optimize, dtype=dtype)
    spread, (report,) = edit(module, RECORDS[:4], moments_for(folder), tmp_path, lam=2.0, write=write)
    model, tokenizer = load_model(folder, dtype, "eager"), load_tokenizer(folder)
    sites = Sites.of(model, architecture_of(load_config(folder)))
    edits = [parse_record(record, i, "") for i, record in enumerate(RECORDS[:4])]
    written = ("attn", "ffn") if write == "attn+ffn" else ("ffn",)
    value_sites = {site: site if optimize != "hidden" else "hidden" for site in written}

    def state(site: str) -> torch.Tensor:
        found = torch.stack([
            plain_hidden(model, tokenizer, e, 2) if site == "hidden"
            else plain_record(model, tokenizer, sites.module(site, 2), e, "{}", output=True) for e in edits
        ])  # fmt: skip
        norm = None if site == "hidden" else sites.norm(site, 2)
        return found if norm is None else norm(found)

    def goal(site: str) -> torch.Tensor:
        found = torch.stack([target.values[value_sites[site], 2] for target in report.targets])
        norm = sites.norm(value_sites[site], 2)
        return found if norm is None else norm(found)

    with torch.no_grad():
        start = state("hidden")
        lacking = {site: goal(site) - state(value_sites[site]) for site in written}
        wanted = sum(lacking.values())
        after_writes = []
        for layer in report.layers:
            name = sites.weight_name(layer.site, layer.layer)
            add_to_weight(sites.module(layer.site, layer.layer), spread.edited.deltas[name].dense())
            moved = ((state("hidden") - start) * wanted).sum(-1) / (wanted * wanted).sum(-1)
            assert layer.overshoot == pytest.approx(float((moved - 1).mean()), rel=1e-4, abs=1e-5)
            left = {s: (goal(s) - state(value_sites[s])).norm(dim=-1) / lacking[s].norm(dim=-1) for s in written}
            after_writes.append({site: float(values.mean()) for site, values in left.items()})
    # Where both sites are written, a site is measured again after the other's next write.
    for i, layer in enumerate(report.layers):
        seen = after_writes[min(i + len(written) - 1, len(after_writes) - 1)][layer.site]
        assert layer.residual_after == pytest.approx(seen, rel=1e-4)
    assert report.layers[-1].overshoot > report.layers[0].overshoot


def plain_hidden(model, tokenizer, asked, layer: int) -> torch.Tensor:
    """What leaves a layer at the subject's last token."""
    text = asked.prompt.replace("{}", asked.subject)
    end = len(asked.prompt.split("{}")[0] + asked.subject)
    encoded = tokenizer(text, return_offsets_mapping=True)
    index = max(i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a <= end - 1 < b)
    output = model(torch.tensor([encoded["input_ids"]]), output_hidden_states=True)
    return output.hidden_states[layer + 1][0, index]


def test_an_edit_that_was_there_already_does_not_count():
    target = torch.tensor([[10.0, 0.0], [10.0, 0.0]])
    values_at_first = torch.tensor([[6.0, 0.0], [10.0, 1e-6]])
    stream = torch.zeros(2, 2)
    processes = ProcessGroup(strategy=None, rank=0, size=1)
    arrival = ResidualTracker({"ffn": lambda values: target - values}, [values_at_first], stream, processes, 2)
    left = arrival.left("ffn", torch.tensor([[9.0, 0.0], [10.0, 3.0]]))
    assert left[0] == pytest.approx(0.25)
    assert left[1].isnan()
    arrival.record_overshoot(stream)
    arrival.record_overshoot(torch.tensor([[6.0, 5.0], [100.0, 100.0]]))
    assert arrival.overshoots == pytest.approx([-1.0, 0.5])


def test_the_condition_bound_is_one():
    generator = torch.Generator().manual_seed(0)
    for scale in (0.0, 1.0, 3.0):
        rows = torch.randn(60, 40, generator=generator, dtype=torch.float64)
        matrix = (rows * torch.logspace(0, scale, 40, dtype=torch.float64)).T @ rows
        matrix = matrix @ matrix.T + 0.1 * torch.eye(40, dtype=torch.float64)
        bound, true = condition_bound(torch.linalg.cholesky(matrix)), float(np.linalg.cond(matrix.numpy()))
        assert 1 < bound <= true * (1 + 1e-9)
    diagonal = torch.tensor([1.0, 4.0, 100.0], dtype=torch.float64)
    assert condition_bound(torch.linalg.cholesky(diagonal.diag())) == pytest.approx(100)


@pytest.mark.parametrize("logger", [TensorBoardLogger, CSVLogger])
def test_a_full_disk_is_told_with_the_folder(inputs, tmp_path, monkeypatch, logger):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(logger, "save", fail)
    with pytest.raises(OSError, match="No space left on device: ") as caught:
        fit(inputs, tmp_path / "run")
    assert caught.value.filename == str(tmp_path / "run")


def test_other_errors_keep_what_they_say(inputs, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset")

    monkeypatch.setattr(TensorBoardLogger, "save", fail)
    with pytest.raises(ConnectionResetError) as caught:
        fit(inputs, tmp_path / "run")
    assert caught.value.filename is None
