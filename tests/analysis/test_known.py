"""The command ``known``: which records it keeps, what it writes, and its errors."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pytest
import torch

from pmet_lightning.analysis.facts import KnownFact, answer_ranks, answer_row, read_facts
from pmet_lightning.analysis.known import Candidate, known, rank_records
from pmet_lightning.analysis.options import LoadOptions, RecordOptions
from pmet_lightning.cli.dispatch import main
from pmet_lightning.data.encoder import PromptEncoder, load_tokenizer
from pmet_lightning.data.fields import RecordError
from pmet_lightning.data.readers import read_edits, read_records
from pmet_lightning.model.loading import load_model
from tests.planted import FACTS, records, save_planted, written
from tests.tiny import RECORDS


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A model that knows three facts, those of ``FACTS``."""
    return save_planted("gpt2", tmp_path_factory.mktemp("planted"), 1, 2)


def run(planted: str, tmp_path, *arguments: str):
    out = tmp_path / "known.json"
    main(["known", "--out", str(out), "--model.model_name", planted, "--model.device", "cpu", *arguments])
    return json.loads(out.read_text())


def plain_rank(model, encoder: PromptEncoder, fact, answer: str) -> int:
    """One pass for every token, and a sorted list of all logits."""
    row = answer_row(fact, answer, encoder)
    prompt = row.ids[: len(row.ids) - len(row.labels) + 1]
    ranks = []
    for i, label in enumerate(row.labels):
        logits = model(input_ids=torch.tensor([[*prompt, *row.labels[:i]]])).logits[0, -1]
        ranks.append(logits.argsort(descending=True).tolist().index(label) + 1)
    return max(ranks)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_rank_is_that_of_the_least_expected_token(loaded, tmp_path, family):
    model, _, tokenizer = loaded(family)
    encoder = PromptEncoder.of(tokenizer)
    facts = read_facts(written(tmp_path, RECORDS))
    rows = [answer_row(fact, fact.new, encoder) for fact in facts]
    assert len({len(row.labels) for row in rows}) > 1
    expected = [plain_rank(model, encoder, fact, fact.new) for fact in facts]
    assert len(set(expected)) > 3
    assert answer_ranks(model, rows, encoder.pad_id, 1000) == expected
    assert answer_ranks(model, rows, encoder.pad_id, 1) == expected  # a row at a time
    assert answer_ranks(model, [], encoder.pad_id, 1) == []


@torch.no_grad()
def test_the_first_choice_is_what_the_model_says_by_itself(tmp_path):
    known(str(tmp_path / "known.json"), LoadOptions(device="cpu"), RecordOptions(limit=12))
    kept = json.loads((tmp_path / "known.json").read_text())
    model, tokenizer = load_model("atlas"), load_tokenizer("atlas")
    said = []
    for edit in read_edits("atlas-records", limit=12):
        ids = tokenizer(edit.question, return_tensors="pt")["input_ids"]
        text = tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :])
        said += [edit.case_id] if text.startswith(f" {edit.target_true}") else []
    assert [str(record["case_id"]) for record in kept] == said
    assert len(said) > 6


def test_known_records_are_written_as_they_are_stored(planted, tmp_path, caplog):
    caplog.set_level("INFO")
    stored = [{**record, "relation": name, "note": "ü"} for record, name in zip(records(), "abb", strict=True)]
    stored[1]["ground_truth"] = "tennis"
    assert run(planted, tmp_path, "--data.path", written(tmp_path, stored)) == [stored[0], stored[2]]
    assert "known: 2 of 3 records\n  a: 1 of 1\n  b: 1 of 2" in caplog.text
    assert [edit.subject for edit in read_edits(str(tmp_path / "known.json"))] == [
        stored[0]["subject"],
        stored[2]["subject"],
    ]


def test_more_tokens_count_as_known_with_a_larger_top(planted, tmp_path):
    stored = [{**record, "ground_truth": "ice hockey"} if i else record for i, record in enumerate(records())]
    path = written(tmp_path, stored)
    model, encoder = load_model(planted), PromptEncoder.of(load_tokenizer(planted))
    ranks = [plain_rank(model, encoder, fact, fact.true) for fact in read_facts(path)]
    assert ranks[0] == 1 < min(ranks[1:])
    for top in sorted({*ranks, 2}):
        (tmp_path / "known.json").unlink(missing_ok=True)
        kept = [record for record, rank in zip(stored, ranks, strict=True) if rank <= top]
        assert run(planted, tmp_path, "--data.path", path, "--top", str(top)) == kept


def test_other_formats_and_a_selection(planted, tmp_path):
    rewrites = [
        {
            "prompt": f["prompt"],
            "subject": f["subject"],
            "target_new": {"str": "x"},
            "target_true": {"str": f["ground_truth"]},
        }
        for f in FACTS
    ]
    wrong = {**rewrites[1], "target_true": {"str": "tennis"}}
    both = [{"requested_rewrite": rewrites[:2]}, {"requested_rewrite": [rewrites[0], wrong]}]  # MQuAKE
    fact = {
        "subject": FACTS[2]["subject"],
        "attribute": "Lima",
        "prompt": f"The birthplace of {FACTS[2]['subject']} is",
    }
    stored = [*both, {"requested_rewrite": rewrites[2]}, fact]
    path = written(tmp_path, stored)
    assert run(planted, tmp_path, "--data.path", path) == [stored[0], stored[2], stored[3]]
    (tmp_path / "known.json").unlink()
    assert run(planted, tmp_path, "--data.path", path, "--data.skip", "1", "--data.limit", "2") == [stored[2]]
    (tmp_path / "known.json").unlink()
    with (tmp_path / "facts.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records()[0]))
        writer.writeheader()
        writer.writerows(records())
    assert run(planted, tmp_path, "--data.path", str(tmp_path / "facts.csv")) == records()


def test_earth_is_read_by_its_name(planted, tmp_path):
    vocabulary = len(load_tokenizer(planted))
    kept = run(planted, tmp_path, "--data.path", "earth-records", "--data.limit", "5", "--top", str(vocabulary))
    assert kept == [record for _, _, record in read_records("earth-records", limit=5)]


def test_records_without_an_old_object_are_left_out(planted, tmp_path, caplog):
    caplog.set_level("INFO")
    stored = [{**records()[0], "subject": "Danila Morvane"}, RECORDS[1]]
    assert run(planted, tmp_path, "--data.path", written(tmp_path, stored)) == stored[:1]
    assert "left out: 1 of 2 records, which name no old object" in caplog.text


def test_an_answer_without_a_token_of_its_own_is_not_known(planted, caplog):
    caplog.set_level("INFO")
    facts = [KnownFact(str(i), f["prompt"], f["subject"], f["ground_truth"], None) for i, f in enumerate(FACTS)]
    facts[1] = replace(facts[1], true=" ")
    candidates = [Candidate({}, [fact]) for fact in facts]
    assert rank_records(load_model(planted), PromptEncoder.of(load_tokenizer(planted)), candidates, 1000) == [
        1,
        None,
        1,
    ]
    assert "not known: 1 of 3 records" in caplog.text


def test_bad_input_leaves_nothing_behind(planted, tmp_path):
    path = written(tmp_path, records())
    unknown = [{**record, "ground_truth": "tennis"} for record in records()]
    (tmp_path / "new").mkdir()
    cases = [
        (FileNotFoundError, "no edits file", ["--data.path", "nowhere.json"]),
        (FileNotFoundError, "cannot load 'nowhere'", ["--data.path", path, "--model.model_name", "nowhere"]),
        (ValueError, "--model.device", ["--data.path", path, "--model.device", "abacus"]),
        (
            RecordError,
            "none of the 2 records names an old object",
            ["--data.path", written(tmp_path / "new", RECORDS[:2])],
        ),
    ]
    for error, text, arguments in cases:
        with pytest.raises(error, match=text):
            run(planted, tmp_path, *arguments)
    written(tmp_path / "new", unknown)
    with pytest.raises(ValueError, match="knows none of the 3 old objects; .* or a --top above 1"):
        run(planted, tmp_path, "--data.path", str(tmp_path / "new" / "records.json"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "records.json"]
    (tmp_path / "known.json").write_text("mine")
    with pytest.raises(FileExistsError, match=r"--out .*known\.json: expected a new file, but it exists"):
        run(planted, tmp_path, "--data.path", path)
    assert (tmp_path / "known.json").read_text() == "mine"
