"""Every score against a slow implementation of its own: raw records, one text at a time, transformers alone."""

from __future__ import annotations

import json
import math
import re
import string
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pmet_lightning import EditScores
from pmet_lightning.cli.dispatch import main
from pmet_lightning.data.encoder import PromptEncoder
from pmet_lightning.data.readers import read_edits
from pmet_lightning.evaluation.probes import ProbeResult, RecordResult, compare_with_clean, score_probes
from pmet_lightning.utils.resources import locate
from tests.tiny import save_tiny

CPU = torch.device("cpu")
CORE = ("efficacy", "generalisation", "specificity")


class Slow:
    """Scores of raw records, question after question."""

    def __init__(self, folder: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def tokens(self, prompt: str, answer: str) -> tuple[float, list[bool], list[int]]:
        """NLL, which tokens are the argmax, and the argmax."""
        head = len(self.tokenizer(prompt).input_ids)
        ids = self.tokenizer(f"{prompt} {answer}").input_ids
        log_p = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        places = range(head, len(ids))
        nll = -sum(float(log_p[i - 1, ids[i]]) for i in places) / len(places)
        argmax = [int(log_p[i - 1].argmax()) for i in places]
        return nll, [a == ids[i] for a, i in zip(argmax, places, strict=True)], argmax

    @torch.no_grad()
    def free(self, prompt: str, count: int) -> str:
        ids = self.tokenizer(prompt, return_tensors="pt").input_ids
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
        return self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    def rewrite(self, prompt: str, new: str, old: str | None) -> dict[str, float]:
        nll, hits, _ = self.tokens(prompt, new)
        if old is None:
            return {"": sum(hits) / len(hits), "_magnitude": math.exp(-nll), "_accuracy": float(all(hits))}
        other, _, _ = self.tokens(prompt, old)
        magnitude = math.exp(-nll) - math.exp(-other)
        return {"": float(nll < other), "_magnitude": magnitude, "_accuracy": float(all(hits))}

    def said(self, prompt: str, answer: str, count: int) -> dict[str, float]:
        text = self.free(prompt, count)
        sentence = re.split(r"\n|(?<=[.!?])\s|(?<=[.!?])$", text.strip())[0]
        plain, known, wanted = (_plain(t) for t in (sentence, text, answer))
        return {"_exact": float(plain == wanted), "_contains": float(f" {wanted} " in f" {known} ")}

    def counterfact(self, record: dict, free: int) -> dict[str, float]:
        asked = record["requested_rewrite"]
        new, old = asked["target_new"]["str"], asked["target_true"]["str"]
        bare = asked["prompt"].format(asked["subject"])
        groups = {"efficacy": [bare], "generalisation": record["paraphrase_prompts"]}
        scores = {kind: [self.rewrite(p, new, old) for p in prompts] for kind, prompts in groups.items()}
        if free:
            for kind, prompts in groups.items():
                scores[f"{kind}/free"] = [self.said(p, new, free) for p in prompts]
        scores["specificity"] = [self.rewrite(p, old, new) for p in record["neighborhood_prompts"]]
        return _means(scores)

    def zsre(self, record: dict, free: int) -> dict[str, float]:
        answer = record["answers"][0]
        groups = {"efficacy": [record["src"]], "generalisation": [record["rephrase"]]}
        scores = {kind: [self.rewrite(p, answer, None) for p in prompts] for kind, prompts in groups.items()}
        scores["specificity"] = [self.rewrite(record["loc"] + "?", record["loc_ans"], None)]
        return _means(scores)

    def knowedit(self, record: dict, free: int) -> dict[str, float]:
        scores = {"efficacy": [self.rewrite(record["prompt"], record["target_new"], record["ground_truth"])]}
        for kind, name in (("portability", "portability"), ("specificity", "locality")):
            for question in (q for group in record[name].values() for q in group):
                forms = [
                    f for forms in question["ground_truth"] for f in (forms if isinstance(forms, list) else [forms])
                ]
                forms = [f for f in forms if f.strip()]
                if forms:
                    each = [self.rewrite(question["prompt"], form, None) for form in forms]
                    best = {suffix: max(one[suffix] for one in each) for suffix in each[0]}
                    scores.setdefault(kind, []).append(best)
        return _means(scores)


def _plain(text: str) -> str:
    text = "".join(c if c not in string.punctuation else " " for c in text.casefold())
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def _means(scores: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    found = defaultdict(list)
    for kind, rows in scores.items():
        for row in rows:
            for suffix, value in row.items():
                found[kind.removesuffix("/free") + suffix].append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


def compare(model: str, path: str, form: str, limit: int, free: int) -> None:
    """Our table over some records against the means of the slow one."""
    slow = Slow(model)
    records = json.loads(Path(locate(path)).read_text())[:limit]
    rows = [getattr(slow, form)(record, free) for record in records]
    edits = read_edits(path, limit=limit)
    encoder = PromptEncoder(slow.tokenizer)
    found = score_probes(slow.model, encoder, [e.probes for e in edits], 2048, CPU, free)
    scores = EditScores()
    for i in range(0, len(found), 7):
        scores.update([RecordResult(i + j, tuple(record)) for j, record in enumerate(found[i : i + 7])])
    table = {name: float(value) for name, value in scores.compute().items()}
    assert table["count"] == len(records)
    names = {name for row in rows for name in row}
    assert {*CORE[:1], "specificity"} <= names
    for name in names:
        values = [row[name] for row in rows if name in row]
        assert table[name] == pytest.approx(100 * sum(values) / len(values), abs=2e-3), name
    if all(kind in names for kind in CORE):
        parts = [table[kind] for kind in CORE]
        harmonic = 3 / sum(1 / part for part in parts) if min(parts) > 0 else 0.0
        assert table["score"] == pytest.approx(harmonic)


def test_on_atlas():
    compare(locate("atlas"), "atlas-records", "counterfact", 8, 12)


FORMS = {
    "counterfact": ("counterfact_250.json", 250),
    "zsre": ("zsre_300.json", 300),
    "knowedit": ("knowedit_wiki_counterfact_60.json", 60),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_on_real_records(shared, form):
    compare(str(shared / "data/models/stories260K"), str(shared / "data" / FORMS[form][0]), form, 12, 4)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_on_all_real_records(shared, form):
    name, count = FORMS[form]
    compare(str(shared / "data/models/stories260K"), str(shared / "data" / name), form, count, 4)


def test_what_neighbours_keep(tmp_path):
    """KnowEdit's locality: the argmax tokens in the answer's place, before and after, question by question."""
    folders = [save_tiny("gpt2", tmp_path / str(seed), seed) for seed in (0, 1)]
    record = {
        "prompt": "{} plays the sport of", "subject": "Torvik Elmson", "target_new": "ice hockey",
        "locality": {"Relation_Specificity": [
            {"prompt": "Torvik Elmson lives in", "ground_truth": [["New Zealand", "NZ"]]},
            {"prompt": "The mother of Torvik Elmson is", "ground_truth": [["Brisela Vantoro"]]},
        ]},
    }  # fmt: skip
    path = tmp_path / "records.json"
    path.write_text(json.dumps([record]))
    (edit,) = read_edits(str(path))
    before, after = Slow(folders[0]), Slow(folders[1])
    after.model.load_state_dict(
        {k: 0.9 * v + 0.1 * after.model.state_dict()[k] for k, v in before.model.state_dict().items()}
    )
    found = []
    for slow in (before, after):
        (results,) = score_probes(slow.model, PromptEncoder(slow.tokenizer), [edit.probes], 512, CPU)
        found.append(results)
    kept = []
    for question in record["locality"]["Relation_Specificity"]:
        answer = question["ground_truth"][0][0]
        tokens = [slow.tokens(question["prompt"], answer)[2] for slow in (before, after)]
        kept.append(sum(a == b for a, b in zip(*tokens, strict=True)) / len(tokens[0]))
    results = compare_with_clean(found[1], found[0])
    assert [r.kept for r in results if r.kind == "specificity"] == pytest.approx(kept)
    assert 0 < sum(kept) < 2, "the two models agree in part, so that this can fail"
    scores = EditScores()
    scores.update([RecordResult(0, results)])
    assert float(scores.compute()["specificity_kept"]) == pytest.approx(50 * sum(kept))


@torch.no_grad()
def test_next_tokens_after_the_neighbors_questions(tmp_path):
    """KL and overlaps against whole distributions, one question at a time; the KL is at most the whole one."""
    folders = [save_tiny("gpt2", tmp_path / str(seed), seed) for seed in (0, 1)]
    before, after = Slow(folders[0]), Slow(folders[1])
    after.model.load_state_dict(
        {k: 0.9 * v + 0.1 * after.model.state_dict()[k] for k, v in before.model.state_dict().items()}
    )
    edits = read_edits("atlas-records", limit=3)
    probes, found = [edit.probes for edit in edits], [None] * len(edits)
    encoder = PromptEncoder(before.tokenizer)
    for slow in (before, after):
        found, clean = score_probes(slow.model, encoder, probes, 512, CPU, clean=found), found
    results = [compare_with_clean(a, b) for a, b in zip(found, clean, strict=True)]
    asked = [probe for record in probes for probe in record]
    for probe, result in zip(asked, (result for record in results for result in record), strict=True):
        if probe.kind != "specificity":
            assert result.kl is None
            continue
        ids = torch.tensor([before.tokenizer(probe.prompt).input_ids])
        p, q = (slow.model(ids).logits[0, -1].double().softmax(-1) for slow in (before, after))
        order, other = p.argsort(descending=True).tolist(), q.argsort(descending=True).tolist()
        kept, rest = order[:256], order[256:]
        groups = [(float(p[i]), float(q[i])) for i in kept] + [(float(p[rest].sum()), float(q[rest].sum()))]
        assert result.kl == pytest.approx(sum(a * math.log(a / b) for a, b in groups), rel=1e-4)
        assert 0 < result.kl <= float((p * (p / q).log()).sum()) * (1 + 1e-6)
        for count in (1, 5, 10):
            common = len(set(order[:count]) & set(other[:count])) / count
            assert getattr(result, f"top{count}") == pytest.approx(common)
    scores = EditScores()
    scores.update([RecordResult(i, record) for i, record in enumerate(results)])
    table = {name: float(value) for name, value in scores.compute().items()}
    divergences = [[r.kl for r in record if r.kl is not None] for record in results]
    assert table["specificity_kl"] == pytest.approx(sum(sum(d) / len(d) for d in divergences) / 3), "in nats"
    assert 0 < table["specificity_top10"] < 100


def test_a_record_seen_twice_counts_once():
    """What a sampler repeats to fill the last process changes nothing."""
    draw = torch.rand(9, generator=torch.Generator().manual_seed(0)).tolist()
    records = [RecordResult(i, (ProbeResult("efficacy", value, 0.0),), fluency=value) for i, value in enumerate(draw)]
    once, twice = EditScores(), EditScores()
    once.update(records)
    twice.update(records[4:])
    twice.update(records[:6])
    assert {k: float(v) for k, v in once.compute().items()} == {k: float(v) for k, v in twice.compute().items()}
    assert float(once.compute()["fluency"]) == pytest.approx(100 * sum(draw) / 9)


def validated(folder: Path, devices: int, batch: int) -> dict[str, float]:
    """The figures of validate on some processes, from the logger's file."""
    arguments = [
        "validate", "--config", "pmet.yaml", "--trainer.accelerator", "cpu", "--trainer.run_dir", str(folder),
        "--trainer.devices", str(devices), "--trainer.strategy", "ddp" if devices > 1 else "auto",
        "--data.limit", "5", "--data.evaluation_batch", str(batch), "--trainer.enable_progress_bar", "false",
        "--drift.rows", "5",
    ]  # fmt: skip
    if devices == 1:
        main(arguments)
    else:
        command = [sys.executable, "-m", "pmet_lightning", *arguments]
        run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder.parent)
        assert run.returncode == 0, run.stderr[-2000:]
    lines = (folder / "metrics.csv").read_text().splitlines()
    pairs = zip(lines[0].split(","), lines[1].split(","), strict=True)
    return {name: float(value) for name, value in pairs if value and name not in ("epoch", "step")}


@pytest.mark.slow
def test_one_and_two_processes_agree(tmp_path):
    """One evaluation batch for two processes; more of them, and more exactly: tests/utils/test_distributed.py."""
    one, two = (validated(tmp_path / str(devices), devices, 5) for devices in (1, 2))
    assert one["count"] == two["count"] == 5
    assert one == pytest.approx(two, abs=1e-3)
    assert len(one) > 20
    assert one["perplexity"] > 1


@pytest.mark.slow
def test_texts_and_drift_in_a_run(tmp_path):
    """Fluency, consistency, perplexity and KL through fit, with figures, report and what neighbours keep."""
    out = tmp_path / "run"
    main([
        "fit", "--config", "pmet.yaml", "--trainer.run_dir", str(out), "--trainer.accelerator", "cpu",
        "--trainer.enable_progress_bar", "false", "--data.limit", "4", "--moments.samples", "60",
        "--moments.folder", str(tmp_path / "moments"), "--spread.lam", "20", "--drift.rows", "4",
        "--model.texts.length", "24", "--model.texts.references", "atlas-corpus",
    ])  # fmt: skip
    scores = json.loads((out / "scores.json").read_text())
    for phase in ("before", "after"):
        table = scores[phase]
        assert 200 < table["fluency"] < 700
        assert 0 < table["consistency"] <= 100
        assert table["perplexity"] > 1
    assert scores["after"]["consistency"] > scores["before"]["consistency"], "texts now speak of o*"
    assert scores["after"]["kl"] >= 0
    assert 50 <= scores["after"]["specificity_kept"] <= 100
    assert "specificity_kept" not in scores["before"]
    report = json.loads((out / "report.json").read_text())
    assert [edit["case_id"] for edit in report["edits"]] == ["400", "401", "402", "403"]
    assert report["scores"] == scores
    by_hand = defaultdict(list)
    for edit in report["edits"]:
        by_hand[edit["relation"]].append(edit["after"]["specificity"])
    for line in report["relations"]:
        values = by_hand.pop(line["relation"])
        assert line["count"] == len(values)
        assert line["after"]["specificity"] == pytest.approx(sum(values) / len(values))
    assert not by_hand
    assert "<html" in (out / "report.html").read_text()
