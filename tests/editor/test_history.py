"""The life of an edit: listed, taken back, removed, corrected, and taken over from a patch."""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pmet_lightning import Edit, Editor, PatchError, RecordError, load_patch, read_edits, save_patch
from pmet_lightning.model.patch import read_patch
from tests.harness import matrices
from tests.tiny import RECORDS, save_tiny

FACTS = [{**record, "case_id": f"fact-{i}"} for i, record in enumerate(RECORDS[:6])]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("history")
    save_tiny("gptj", folder / "model")
    save_tiny("gptj", folder / "other", seed=1)
    (folder / "corpus.txt").write_text("\n".join(f"The {n}th text is about the number {n}." for n in range(400)))
    return folder


@pytest.fixture
def make(base):
    def made(dtype=torch.float64, **settings):
        model = AutoModelForCausalLM.from_pretrained(base / "model", dtype=dtype)
        moments = {"samples": 40, "folder": str(base / "moments")}
        return Editor(
            model, AutoTokenizer.from_pretrained(base / "model"), layers=[0, 1], corpus=str(base / "corpus.txt"),
            moments=moments, steps=4, contexts=["Once. {}"], lam=2.0, free_tokens=4, **settings,
        )  # fmt: skip

    return made


def weights(editor):
    return {name: value.clone() for name, value in editor.model.state_dict().items()}


def assert_same(one, other, tolerance=0.0):
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=tolerance, msg=name)


def test_the_facts_are_listed_with_what_became_of_them(make):
    editor = make()
    report = editor.edit(FACTS[:3], evaluate=False)
    editor.edit(FACTS[3:4], evaluate=False)
    assert [(fact.edit.case_id, fact.edit_batch) for fact in editor.facts] == [
        ("fact-0", 0), ("fact-1", 0), ("fact-2", 0), ("fact-3", 1)
    ]  # fmt: skip
    assert [(fact.answer, fact.said) for fact in editor.facts[:3]] == [(e["answer"], e["said"]) for e in report.edits]


@pytest.mark.parametrize("out", [0, 2, 4])
def test_removing_a_fact_is_never_having_had_it(make, out):
    """Of one edit batch, against a run without it, to 1e-6 of ΔW."""
    editor, never = make(), make()
    editor.edit(FACTS[:5], evaluate=False)
    editor.remove(FACTS[out]["case_id"])
    never.edit(FACTS[:out] + FACTS[out + 1 : 5], evaluate=False)
    expected = matrices(never._spread.edited.deltas)
    for name, delta in matrices(editor._spread.edited.deltas).items():
        assert float((delta - expected[name]).norm() / expected[name].norm()) < 1e-6
    assert [fact.edit.case_id for fact in editor.facts] == [f["case_id"] for i, f in enumerate(FACTS[:5]) if i != out]
    assert_same(weights(editor), weights(never), 1e-9)


@pytest.mark.parametrize("targets", ["own", "replay", "successive"])
def test_targets_of_several_layers_are_kept(targets, make, tmp_path):
    """A patch holds them: a fact is removed, and a patch taken up again, as with one target."""
    editor, never = (make(spread={"targets": targets}) for _ in range(2))
    editor.edit(FACTS[:4], evaluate=False)
    editor.save_patch(tmp_path / "patch.safetensors")
    names = set(read_patch(tmp_path / "patch.safetensors").targets)
    assert names == {f"{site}-{layer}" for layer in (0, 1) for site in ("attn", "ffn")}
    editor.remove(FACTS[1]["case_id"])
    never.edit([FACTS[0], *FACTS[2:4]], evaluate=False)
    expected = matrices(never._spread.edited.deltas)
    for name, delta in matrices(editor._spread.edited.deltas).items():
        assert float((delta - expected[name]).norm() / expected[name].norm()) < 1e-6


TWINS = [
    {"case_id": str(i), "prompt": prompt, "subject": "Danila Morvane", "target_new": target}
    for i, (prompt, target) in enumerate([("{} plays the sport of", "ice hockey"), ("{} is a citizen of", "Norway")])
]


def test_what_shared_its_target_with_a_removed_fact_has_one_of_its_own(make):
    editor, never = make(), make()
    editor.edit([*TWINS, FACTS[0]], evaluate=False)
    shared = editor.facts[1].values[("ffn", 1)]
    assert torch.equal(shared, editor.facts[0].values[("ffn", 1)])
    editor.remove("0")
    never.edit([TWINS[1], FACTS[0]], evaluate=False)
    assert not torch.allclose(editor.facts[0].values[("ffn", 1)], shared)
    assert_same(weights(editor), weights(never), 1e-9)


@pytest.mark.parametrize("protect_past", [False, True])
def test_a_later_fact_about_a_subject_does_not_push_out_the_first(make, protect_past):
    """Their key is one: its new value says both, and the old value is not protected."""
    editor, plain = (make(spread={"protect_past": protect_past}) for _ in range(2))
    editor.edit([TWINS[0], FACTS[0]], evaluate=False)
    editor.edit([TWINS[1]], evaluate=False)
    assert [fact.edit.case_id for fact in editor.facts] == ["0", "fact-0", "1"]
    plain.edit([TWINS[0], FACTS[0]], evaluate=False)
    both = [Edit(t["case_id"], t["prompt"], t["subject"], t["target_new"]) for t in TWINS[::-1]]
    (together, _) = plain._module.find_targets(both)
    torch.testing.assert_close(editor.facts[2].values["ffn", 1], together.values["ffn", 1], rtol=0, atol=1e-9)
    past = editor._spread.edited.past_keys
    assert [len(keys) for keys in past.values()] == ([3, 3] if protect_past else []), "a row for each fact"


@pytest.mark.parametrize("out", ["0", "1"])
def test_a_fact_that_shared_its_target_with_an_earlier_one_is_removed(make, out):
    editor, never = make(), make()
    editor.edit([TWINS[0], FACTS[0]], evaluate=False)
    editor.edit([TWINS[1], FACTS[1]], evaluate=False)
    editor.remove(out)
    never.edit([fact for fact in (TWINS[0], FACTS[0]) if fact["case_id"] != out], evaluate=False)
    never.edit([fact for fact in (TWINS[1], FACTS[1]) if fact["case_id"] != out], evaluate=False)
    kept = {fact.edit.case_id: fact for fact in never.facts}
    for fact in editor.facts:
        if fact.edit.case_id != "fact-1":  # found while the other one was there, as targets of later edit batches are
            torch.testing.assert_close(fact.values["ffn", 1], kept[fact.edit.case_id].values["ffn", 1])


def test_facts_of_two_patches_that_have_one_key_share_a_target(make, tmp_path):
    one, other, together = make(), make(), make()
    one.edit([TWINS[0], FACTS[0]], evaluate=False)
    other.edit([TWINS[1], FACTS[1]], evaluate=False)
    other.save_patch(tmp_path / "other.safetensors")
    one.merge(tmp_path / "other.safetensors")
    together.edit([TWINS[0], FACTS[0], TWINS[1], FACTS[1]], evaluate=False)
    assert_same(weights(one), weights(together), 1e-9)


PROMPTS = [
    "The mother tongue of {} is",
    "{} plays the sport of",
    "{} is a citizen of",
    "The seat of {} is in the city of",
]
NAMES = ["Danila Morvane", "Torvik Elmson", "Quillon Motors", "Ravi Oskelund", "Brisela Vantoro", "Orvandel", "Lisbon"]
OBJECTS = ["English", "ice hockey", "Norway", "clarinet", "Swedish"]


@pytest.mark.slow
def test_each_of_fifty_facts_is_removed_in_turn(make):
    """Against a run of the other 49, to 1e-6 of ΔW; between two removals the fact is put back."""
    facts = [
        {"case_id": str(i), "prompt": prompt, "subject": f"{name} {number}", "target_new": OBJECTS[i % len(OBJECTS)]}
        for i, (number, prompt, name) in enumerate(itertools.product((1, 2), PROMPTS, NAMES))
    ][:50]
    assert len(facts) == 50
    editor, never = make(), make()
    editor.edit(facts, evaluate=False)
    for out in range(50):
        editor.remove(str(out))
        never.edit([*facts[:out], *facts[out + 1 :]], evaluate=False)
        expected = matrices(never._spread.edited.deltas)
        for name, delta in matrices(editor._spread.edited.deltas).items():
            assert float((delta - expected[name]).norm() / expected[name].norm()) < 1e-6
        assert [fact.edit.case_id for fact in editor.facts] == [str(i) for i in range(50) if i != out]
        editor.undo()
        never.undo()


@pytest.mark.slow
def test_a_removal_costs_less_than_a_tenth_of_the_run():
    """In tokens through the layers of Atlas: a fit of 50 facts finds targets and asks, a removal does neither."""
    editor = Editor.from_config("pmet.yaml", drift={"text": None}, device="cpu")
    tokens = {"run": 0, "removal": 0}
    doing = "run"

    def count(_module, inputs, outputs):
        tokens[doing] += outputs[0].shape[:-1].numel()

    for layer in editor._module.sites.layers:
        layer.register_forward_hook(count)
    editor.edit(read_edits("atlas-records")[:50])
    doing = "removal"
    editor.remove(editor.facts[7].edit)
    assert 0 < tokens["removal"] < tokens["run"] / 10


def test_facts_are_named_in_any_way(make):
    editor = make()
    clean = weights(editor)
    editor.edit(FACTS[:4], evaluate=False)
    full = weights(editor)
    question = FACTS[0]["prompt"].format(FACTS[0]["subject"])
    for name in (FACTS[1]["subject"], question, FACTS[2]):
        editor.remove(name)
    assert [fact.edit.case_id for fact in editor.facts] == ["fact-3"]
    assert editor.edits_written == 1
    editor.remove([FACTS[3]["case_id"]])
    assert editor.facts == ()
    assert_same(weights(editor), clean)
    editor.undo(4)
    assert_same(weights(editor), full, 1e-12)
    assert len(editor.facts) == 4


def test_a_name_of_no_fact_changes_nothing(make):
    editor = make()
    editor.edit(FACTS[:2], evaluate=False)
    before = weights(editor)
    with pytest.raises(ValueError, match="Torvik Elms'.*did you mean 'Torvik Elmson'"):
        editor.remove(["fact-0", "Torvik Elms"])
    assert_same(weights(editor), before)
    assert len(editor.facts) == 2


def test_a_removal_that_fails_changes_nothing(make, monkeypatch):
    editor = make()
    editor.edit(FACTS[:3], evaluate=False)
    before = weights(editor)
    monkeypatch.setattr("pmet_lightning.write.weight_spread.log_writes", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        editor.remove("fact-1")
    monkeypatch.undo()
    assert_same(weights(editor), before)
    assert (editor.edits_written, len(editor.facts)) == (3, 3)
    editor.remove("fact-1")
    assert len(editor.facts) == 2


def test_several_calls_are_undone(make):
    editor = make()
    states = [weights(editor)]
    for fact in FACTS[:4]:
        editor.edit([fact], evaluate=False)
        states.append(weights(editor))
    editor.undo()
    assert_same(weights(editor), states[3])
    editor.undo(2)
    assert_same(weights(editor), states[1], 1e-12)
    assert [fact.edit.case_id for fact in editor.facts] == ["fact-0"]
    editor.edit(FACTS[1:2], evaluate=False)
    assert_same(weights(editor), states[2], 1e-9)
    with pytest.raises(RuntimeError, match="3 steps, but 2 calls"):
        editor.undo(3)
    editor.undo(2)
    assert_same(weights(editor), states[0])
    with pytest.raises(RuntimeError, match="nothing to undo"):
        editor.undo()


def test_a_patch_is_taken_over(make, base, tmp_path, monkeypatch):
    """Listed, removed and extended by another editor as by the one that made it; no corpus is read."""
    editor = make()
    editor.edit(FACTS[:3], evaluate=False)
    editor.edit(FACTS[3:5], evaluate=False)
    editor.save_patch(tmp_path / "patch.safetensors")
    model = AutoModelForCausalLM.from_pretrained(base / "model", dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(base / "model")
    with monkeypatch.context() as patched:
        patched.setattr("pmet_lightning.moments.second_moments.corpus_fingerprint", lambda *_: 1 / 0)
        other = Editor.from_patch(tmp_path / "patch.safetensors", model, tokenizer, moments_folder=base / "moments")
        assert_same(weights(other), weights(editor), 1e-12)
        assert [fact.plain() for fact in other.facts] == [fact.plain() for fact in editor.facts]
        other.remove("fact-1")
        other.edit(FACTS[5:6], evaluate=False)
        other.save_patch(tmp_path / "again.safetensors")
    editor.remove("fact-1")
    editor.edit(FACTS[5:6], evaluate=False)
    assert_same(weights(other), weights(editor), 1e-9)
    editor.save_patch(tmp_path / "same.safetensors")
    first, second = (load_patch(tmp_path / f"{name}.safetensors")[1] for name in ("again", "same"))
    assert first["moments"] == second["moments"]
    assert first["facts"] == second["facts"]
    other.revert()
    clean = AutoModelForCausalLM.from_pretrained(base / "model", dtype=torch.float64)
    assert_same(weights(other), clean.state_dict())


def test_a_patch_of_another_model_or_an_earlier_version_is_refused(make, base, tmp_path):
    editor = make()
    editor.edit(FACTS[:1], evaluate=False)
    editor.save_patch(tmp_path / "patch.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(base / "model")
    other = AutoModelForCausalLM.from_pretrained(base / "other", dtype=torch.float64)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(PatchError, match="was made for the model"):
        Editor.from_patch(tmp_path / "patch.safetensors", other, tokenizer, moments_folder=base / "moments")
    assert_same(other.state_dict(), before)
    deltas, manifest = load_patch(tmp_path / "patch.safetensors")
    save_patch(tmp_path / "old.safetensors", deltas, {k: v for k, v in manifest.items() if k != "facts"})
    with pytest.raises(PatchError, match="earlier version"):
        Editor.from_patch(tmp_path / "old.safetensors", other, tokenizer, moments_folder=base / "moments")


@pytest.mark.parametrize("change", ["weights", "manifest", "format"])
def test_a_patch_that_was_changed_is_refused(make, tmp_path, change):
    editor = make()
    editor.edit(FACTS[:1], evaluate=False)
    path = tmp_path / "patch.safetensors"
    editor.save_patch(path)
    content = path.read_bytes()
    where = {
        "weights": len(content) - 5,
        "manifest": content.index(b"Danila"),
        "format": content.index(b'format\\": 2') + 10,
    }
    at = where[change]
    path.write_bytes(content[:at] + (b"9" if change == "format" else bytes([content[at] ^ 1])) + content[at + 1 :])
    with pytest.raises(PatchError, match="format 9" if change == "format" else "not as it was written"):
        load_patch(path)


def test_a_correction_takes_the_place_of_the_old_fact(make):
    """With protected keys: its old key no longer counts, so that ΔW is as if only the other facts were protected."""
    editor = make(spread={"protect_past": True})
    editor.edit(FACTS[:3], evaluate=False)
    new = {**FACTS[1], "target_new": "chess", "case_id": "corrected"}
    first_keys = {place: keys.clone() for place, keys in editor._spread.edited.past_keys.items()}
    editor.edit([new], evaluate=False)
    assert [fact.edit.case_id for fact in editor.facts] == ["fact-0", "fact-2", "corrected"]
    for place, keys in editor._spread.edited.past_keys.items():
        assert torch.equal(keys[:2], first_keys[place][[0, 2]])
        assert keys.shape == (3, first_keys[place].shape[1])
    editor.undo()
    assert [fact.edit.case_id for fact in editor.facts] == ["fact-0", "fact-1", "fact-2"]
    assert all(torch.equal(keys, first_keys[place]) for place, keys in editor._spread.edited.past_keys.items())


def test_each_patch_in_a_folder_has_its_own_protected_keys(make, base, tmp_path):
    """One without a fact beside the one that it was made of, and one in the place of another."""
    editor = make(spread={"protect_past": True})
    editor.edit(FACTS[:2], evaluate=False)
    editor.edit(FACTS[2:4], evaluate=False)
    editor.save_patch(tmp_path / "all.safetensors")
    editor.save_patch(tmp_path / "less.safetensors")
    editor.remove("fact-1")
    editor.save_patch(tmp_path / "less.safetensors")
    assert len(list(tmp_path.glob("*-past-*"))) == 2
    tokenizer = AutoTokenizer.from_pretrained(base / "model")

    def taken_over(name):
        model = AutoModelForCausalLM.from_pretrained(base / "model", dtype=torch.float64)
        return Editor.from_patch(tmp_path / name, model, tokenizer, moments_folder=base / "moments")

    for name, count in (("all", 4), ("less", 3)):
        other = taken_over(f"{name}.safetensors")
        assert {len(keys) for keys in other._spread.edited.past_keys.values()} == {count}
    next(tmp_path.glob("all-past-*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"protected keys of the 2 edit batches in all\.safetensors"):
        taken_over("all.safetensors")


def test_a_correction_is_no_loss(make):
    """The verdict does not complain that the replaced fact is gone."""
    editor = make()
    editor.edit(FACTS[:1], evaluate=False)
    editor._spread.edited.facts = tuple(replace(fact, said=True) for fact in editor.facts)
    report = editor.edit([{**FACTS[0], "target_new": "French"}], evaluate=False)
    assert report.verdict.undone == ()
    assert [fact.edit.target for fact in editor.facts] == ["French"]


def test_one_fact_is_given_by_its_parts(make):
    editor, other = make(), make()
    editor.edit(FACTS[0]["prompt"], FACTS[0]["subject"], FACTS[0]["target_new"], evaluate=False)
    other.edit(FACTS[:1], evaluate=False)
    assert_same(weights(editor), weights(other))
    with pytest.raises(RecordError, match="subject"):
        editor.edit(FACTS[0]["prompt"], target="English")


def test_parallel_lists_under_easyedit_s_names(make):
    editor, other = make(), make()
    editor.edit({
        "prompts": [fact["prompt"].format(fact["subject"]) for fact in FACTS[:2]],
        "subject": [fact["subject"] for fact in FACTS[:2]],
        "target_new": [fact["target_new"] for fact in FACTS[:2]],
    }, evaluate=False)  # fmt: skip
    other.edit(FACTS[:2], evaluate=False)
    assert_same(weights(editor), weights(other))


def test_generate_is_the_model_s_own(make):
    editor = make()
    texts = editor.generate(["Once upon a time", "The cat"], max_new_tokens=5, do_sample=False)
    assert [len(text) > 0 for text in texts] == [True, True]
    ids = editor.tokenizer("The cat", return_tensors="pt")
    expected = editor.model.generate(**ids, max_new_tokens=5, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert texts[1] == editor.tokenizer.decode(expected, skip_special_tokens=True)


def test_an_upload_is_what_save_writes(make, tmp_path, monkeypatch):
    editor, seen = make(), []

    class Hub:
        def __init__(self, token=None):
            seen.append(token)

        def create_repo(self, repo_id, private, exist_ok):
            seen.append((repo_id, private, exist_ok))

        def upload_folder(self, repo_id, folder_path, commit_message):
            seen.append((repo_id, sorted(path.name for path in folder_path.iterdir())))
            return "https://hub/commit"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    editor.edit(FACTS[:1], evaluate=False)
    assert editor.push_to_hub("me/edited", private=True, token="secret") == "https://hub/commit"
    editor.save_pretrained(tmp_path / "saved")
    assert seen == [
        "secret",
        ("me/edited", True, True),
        ("me/edited", sorted(p.name for p in (tmp_path / "saved").iterdir())),
    ]


def test_warnings_name_the_editor_s_arguments(make, caplog):
    """Inside a call only: a fit from the command line that follows names its options."""
    log = logging.getLogger("pmet_lightning.write.weight_spread")
    with caplog.at_level(logging.WARNING):
        many = [{**FACTS[0], "subject": f"Danila Morvane {i}", "case_id": str(i)} for i in range(90)]
        make().edit(many, evaluate=False)
        log.warning("raise --spread.lam")
    told = [message for message in caplog.messages if "disturb each other" in message]
    assert len(told) == 1
    assert "raise lam, or make edit_batch smaller" in told[0]
    assert caplog.messages[-1] == "raise --spread.lam"
