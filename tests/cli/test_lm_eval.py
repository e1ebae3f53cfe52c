"""Hand-over to lm-evaluation-harness: what is refused before any work, and its numbers beside a plain computation."""

from __future__ import annotations

import json
import logging
import sys
from functools import partial

import pytest
import torch
from jsonargparse import auto_cli
from transformers import AutoModelForCausalLM, AutoTokenizer

from pmet_lightning.cli.lm_eval import harness
from tests.tiny import RECORDS, save_tiny

CHOICES = ["English", "ice hockey", "Lisbon", "New Zealand", "the clarinet"]
DOCS = [
    {"question": r["prompt"].replace("{}", r["subject"]), "choices": CHOICES, "answer": i % len(CHOICES)}
    for i, r in enumerate([*RECORDS, *({**r, "prompt": f"Everybody knows: {r['prompt']}"} for r in RECORDS)])
]
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
"""
CHOOSE = TASK + "doc_to_choice: choices\ndoc_to_target: answer\nmetric_list: [{{metric: acc}}, {{metric: acc_norm}}]\n"
# Of its own a task of this type puts no space between prompt and answer.
CONTINUE = (
    TASK
    + "doc_to_target: \"{{{{' ' + choices[answer]}}}}\"\n"
    + "metric_list: [{{metric: perplexity, aggregation: perplexity, higher_is_better: false}}]\n"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("gpt2", tmp_path_factory.mktemp("harness") / "model")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder with two tasks over one local file, after a check that the harness is installed."""
    pytest.importorskip("lm_eval.models.huggingface", reason="the extra harness is not installed")
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    for name, form, kind in (("choose", CHOOSE, "multiple_choice"), ("continue", CONTINUE, "loglikelihood")):
        text = form.format(name=f"tiny_{name}", data=data, cache=folder / "cache", kind=kind)
        (folder / f"{name}.yaml").write_text(text)
    return str(folder)


@pytest.fixture
def no_defaults(own, monkeypatch):
    """Leave the harness's own 14,000 tasks out, since reading their names takes seconds."""
    from lm_eval import tasks

    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))


# ---- without the harness ----------------------------------------------------------------------------------


def test_absent_the_error_names_the_extra(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r'pip install "pmet-lightning\[harness\]"'):
        harness(model, ["lambada_openai"], str(tmp_path / "results.json"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"out": "old.json"}, FileExistsError, "--out .*old.json: expected a new file"),
        ({"batch_size": 0}, ValueError, "--batch_size is 0"),
        ({"limit": 0}, ValueError, "--limit 0, expected at least 1"),
        ({"include": "nowhere"}, FileNotFoundError, "--include nowhere: expected a folder"),
    ],
)
def test_refused_before_anything_is_imported(arguments, error, message, model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.json").write_text("{}")
    with pytest.raises(error, match=message):
        harness(**{"model": model, "tasks": ["lambada_openai"], "out": "new.json", **arguments})
    assert (tmp_path / "old.json").read_text() == "{}"
    assert not (tmp_path / "new.json").exists()


# ---- with it ----------------------------------------------------------------------------------------------


def log_likelihood(model, tokenizer, prompt: str, answer: str) -> float:
    """Sum of log p of the answer's tokens: one text, one pass."""
    given, whole = (tokenizer(text).input_ids for text in (prompt, f"{prompt} {answer}"))
    assert whole[: len(given)] == given
    with torch.no_grad():
        log_p = model(torch.tensor([whole])).logits[0, len(given) - 1 : -1].log_softmax(dim=-1)
    return float(log_p.gather(1, torch.tensor(whole[len(given) :])[:, None]).sum())


def expected(folder: str) -> dict[str, dict[str, float]]:
    """The metrics of both tasks by their definitions."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    lengths = torch.tensor([len(choice) for choice in CHOICES])
    answers = torch.tensor([doc["answer"] for doc in DOCS])
    sums = torch.tensor([[log_likelihood(model, tokenizer, doc["question"], c) for c in CHOICES] for doc in DOCS])
    plain, by_length = (float((values.argmax(dim=1) == answers).float().mean()) for values in (sums, sums / lengths))
    perplexity = float((-sums.gather(1, answers[:, None]).double().mean()).exp())
    return {"tiny_choose": {"acc": plain, "acc_norm": by_length}, "tiny_continue": {"perplexity": perplexity}}


def test_the_numbers_are_those_of_a_plain_computation(model, own, tmp_path, caplog):
    out = tmp_path / "made" / "results.json"
    with caplog.at_level(logging.INFO):
        auto_cli(
            harness,
            args=[
                "--model", model, "--tasks", "[tiny_choose, tiny_continue]", "--include", own, "--out", str(out),
                "--batch_size", "5", "--device", "cpu",
            ],
            as_positional=False,
        )  # fmt: skip
    found = json.loads(out.read_text())
    assert [path.name for path in out.parent.iterdir()] == ["results.json"]
    for task, metrics in expected(model).items():
        assert found["n-samples"][task]["effective"] == len(DOCS)
        for name, value in metrics.items():
            assert found["results"][task][f"{name},none"] == pytest.approx(value, rel=1e-4), (task, name)
    assert found["config"]["model_args"] == {"pretrained": model}
    table = next(record.getMessage() for record in caplog.records if "the results are in" in record.getMessage())
    assert "tiny_choose" in table
    assert "perplexity" in table


@pytest.mark.usefixtures("no_defaults")
def test_a_limit_takes_the_first_documents(model, own, tmp_path):
    harness(model, ["tiny_choose"], str(tmp_path / "r.json"), include=own, limit=3)
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["n-samples"]["tiny_choose"] == {"original": len(DOCS), "effective": 3}


@pytest.mark.usefixtures("no_defaults")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tasks": ["tiny_chose"]}, ValueError, r"'tiny_chose' among the .*did you mean tiny_choose"),
        ({"tasks": ["a task that nobody has"]}, ValueError, "'a task that nobody has'"),
        ({"tasks": []}, ValueError, "--tasks is empty"),
        ({"model": "."}, FileNotFoundError, "--model .: the folder has no config.json"),
        ({"model": "nowhere/at-all"}, FileNotFoundError, "no such folder, and not on the hub.*Set --model to"),
        ({"device": "gpu"}, ValueError, "--device gpu"),
    ],
)
def test_what_is_unknown_ends_in_a_message(arguments, error, message, model, own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        harness(**{"model": model, "tasks": ["tiny_choose"], "out": "new.json", "include": own, **arguments})
    assert list(tmp_path.iterdir()) == []
