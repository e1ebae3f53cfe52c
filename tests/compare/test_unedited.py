"""The unedited model is asked once for all methods, and every method reports what it would report by itself."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pmet_lightning.cli.dispatch import main
from pmet_lightning.compare.plan import Method, plan_runs, quiet, read_report
from pmet_lightning.compare.results import edit_rows
from pmet_lightning.compare.unedited import UneditedModel, evaluation_settings
from pmet_lightning.evaluation import editable
from pmet_lightning.run.lightning_cli import build_fit, run_fit
from pmet_lightning.write import drift

FAST = {"trainer.accelerator": "cpu", "model.free_tokens": 4, "drift.text": "atlas-corpus", "drift.rows": 4}
QUICK = {"moments.samples": 60, "spread.lam": 20, "model.steps": 4}
METHODS = {
    "PMET": Method(options=QUICK),
    "one by one": Method(options=QUICK | {"data.edit_batch": 1, "drift.max_perplexity": 100.0}),
    "fine-tuning": Method("finetune.yaml", {"model.epochs": 3}, "finetune"),
    "retrieval": Method("retrieve.yaml", command="retrieve"),
}


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """How often questions and text are put to a model, which has one batch of each."""
    calls: Counter[str] = Counter()

    def spy(owner: ModuleType, name: str) -> Callable[..., Any]:
        function = getattr(owner, name)
        return lambda *given: calls.update([name]) or function(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(editable, "score_probes", spy(editable, "score_probes"))
        patch.setattr(drift, "label_logits", spy(drift, "label_logits"))
        yield calls


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison of two edits, and how often the model was asked."""
    folder = tmp_path_factory.mktemp("unedited")
    methods = {name: vars(method) for name, method in METHODS.items()}
    for name in ("PMET", "one by one"):
        methods[name] = methods[name] | {"options": methods[name]["options"] | {"moments.folder": str(folder)}}
    settings = {"out": str(folder / "out"), "edits": [2], "seeds": [1], "least": 1, "options": FAST}
    (folder / "compare.json").write_text(json.dumps(settings | {"methods": methods}))
    with counted() as calls:
        main(["compare", "--config", str(folder / "compare.json")])
    return folder, calls


def test_the_unedited_model_is_asked_once(compared):
    _, calls = compared
    at_once, limits = 2, 2  # of "one by one": scores of each edit batch, and its perplexity
    assert calls["score_probes"] == 1 + len(METHODS) + at_once
    assert calls["label_logits"] == 1 + len(METHODS) + limits


@pytest.mark.parametrize("name", METHODS)
def test_each_method_reports_what_it_reports_by_itself(compared, tmp_path, name):
    folder, _ = compared
    (run,) = [run for run in plan_runs(METHODS, [2], [1], 1) if run.method == name]
    settings = quiet(run.settings(METHODS[name], FAST, folder / "out"), tmp_path / "alone")
    alone = read_report(run_fit(METHODS[name].config, settings, METHODS[name].command))
    shared = read_report(folder / "out" / run.name)
    assert shared["scores"] == alone["scores"]
    assert {"kl", "perplexity", "specificity_kl"} <= set(shared["scores"]["after"])
    assert "perplexity" in shared["scores"]["before"]
    for phase in ("before", "after"):
        rows = [edit_rows([report], phase).nan_to_num(-9) for report in (shared, alone)]
        assert rows[0].equal(rows[1])
    answers = [(where / "answers.jsonl").read_text() for where in (folder / "out" / run.name, tmp_path / "alone")]
    assert answers[0] == answers[1]


def settings_of(folder: Path, changes: Mapping[str, Any], method: Method | None = None) -> str:
    method = method or METHODS["PMET"]
    settings = quiet(FAST | {"data.limit": 2, "model.dtype": "float32"} | changes, folder / "run")
    return evaluation_settings(build_fit(method.config, settings, method.command))


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"model.steps": 3, "spread.lam": 5, "moments.samples": 9, "model.seed": 3}, True),
        ({"data.edit_batch": 1, "model.layers": [1], "model.keep_float32": True}, True),
        ({"drift.fail_if_damaged": True}, True),
        ({"model.dtype": "bfloat16"}, False),
        ({"model.free_tokens": 5}, False),
        ({"model.padding_side": "left"}, False),
        ({"data.shuffle": 1}, False),
        ({"data.skip": 1}, False),
        ({"data.evaluation_batch": 1}, False),
        ({"drift.rows": 5}, False),
        ({"trainer.limit_val_batches": 0}, False),
    ],
)
def test_what_the_answers_depend_on(tmp_path, changes, same):
    assert (settings_of(tmp_path, {}) == settings_of(tmp_path, changes)) == same


def test_methods_that_hold_weights_in_another_precision_ask_for_themselves(tmp_path):
    half = {"model.dtype": "bfloat16"}
    assert settings_of(tmp_path, half) == settings_of(tmp_path, half | {"model.steps": 3})
    assert settings_of(tmp_path, half) != settings_of(tmp_path, half | {"model.layers": [1]})
    assert settings_of(tmp_path, {}) == settings_of(tmp_path, {}, METHODS["fine-tuning"])
    assert settings_of(tmp_path, half) != settings_of(tmp_path, half, METHODS["fine-tuning"])


def test_a_stream_asks_for_itself(tmp_path):
    """It asks about each edit batch before it is written."""
    unedited, found = UneditedModel(), []
    records = tmp_path / "facts.jsonl"
    records.write_text('{"prompt": "{} lives in", "subject": "Ann", "target": "Oslo"}\n')
    settings = QUICK | FAST | {"data.path": str(records), "data.stream": True, "data.edit_batch": 1}
    for number in range(2):
        with counted() as calls:
            given = settings | {"moments.folder": str(tmp_path / "moments")}
            unedited.fit(build_fit("pmet.yaml", quiet(given, tmp_path / f"run{number}")))
        found.append((read_report(tmp_path / f"run{number}")["scores"], calls))
    assert found[0] == found[1]
    assert found[0][1]["score_probes"] == 2
