"""Earth: the table of real facts, and the records that are built from it."""

from __future__ import annotations

import hashlib
import json
import logging
import string
import subprocess
import sys
from collections import Counter

import pytest

from pmet_lightning.data.earth import assign_pools, read_table, records
from pmet_lightning.data.readers import read_edits, read_records, stream_edits

POOLS = ("reporting", "tuning")
NAMES = {"reporting": "earth-records", "tuning": "earth-tuning"}
DIGESTS = {
    "reporting": "20cdfc203deff2a2",
    "tuning": "82f579f44954bc22",
}


@pytest.fixture(scope="module")
def earth():
    return read_table()


@pytest.fixture(scope="module")
def built():
    return {pool: records(pool) for pool in POOLS}


def digest(found: list) -> str:
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]


def rewrites(found: list) -> list[dict]:
    return [record["requested_rewrite"] for record in found]


def test_the_table_is_large_and_every_object_has_enough_subjects(earth):
    assert len(earth.relations) >= 12
    assert sum(len(subjects) for relation in earth.relations for subjects in relation.facts.values()) >= 950
    for relation in earth.relations:
        assert len(relation.facts) >= 4, relation.id
        assert min(map(len, relation.facts.values())) >= 6, relation.id
        assert len(set(relation.wordings) - {relation.prompt}) == len(relation.wordings) >= 4, relation.id
        assert 2 <= len(relation.openings) <= 3
    assert len(set(earth.sentences)) == len(earth.sentences) >= 40


def test_no_fact_is_told_twice_or_by_its_subject(earth):
    for relation in earth.relations:
        subjects = [subject for some in relation.facts.values() for subject in some]
        assert not [subject for subject, count in Counter(subjects).items() if count > 1], relation.id
        for true, some in relation.facts.items():
            assert not [subject for subject in some if true.lower() in subject.lower()], (relation.id, true)


def test_the_texts_of_the_table_are_well_formed(earth):
    for relation in earth.relations:
        for text in (relation.prompt, *relation.wordings, *relation.openings):
            assert text.count("{}") == 1, text
        for wording in (relation.prompt, *relation.wordings):
            assert wording[-1] in string.ascii_letters + ",", f"{wording!r}: an object follows after a space"
        names = [*relation.facts, *(subject for some in relation.facts.values() for subject in some)]
        assert all(isinstance(name, str) and name == name.strip() != "" for name in names), relation.id
    assert all(sentence[-1] == "." for sentence in earth.sentences)


def test_every_object_is_in_every_pool(earth):
    pools = assign_pools(earth)
    shares = Counter(pools.values())
    assert 0.33 < shares["neighbors"] / len(pools) < 0.45
    assert 0.18 < shares["tuning"] / len(pools) < 0.30
    for relation in earth.relations:
        for true, subjects in relation.facts.items():
            counts = Counter(pools[subject] for subject in subjects)
            assert counts["neighbors"] >= 3, (relation.id, true)
            assert counts["tuning"] >= 1 <= counts["reporting"], (relation.id, true)


def test_pools_share_no_subject_and_no_neighbor_is_edited(earth, built):
    edited = {pool: {rewrite["subject"] for rewrite in rewrites(built[pool])} for pool in POOLS}
    assert not edited["reporting"] & edited["tuning"]
    wordings = {relation.id: (relation.prompt, *relation.wordings) for relation in earth.relations}
    objects = {(r.id, subject): true for r in earth.relations for true, some in r.facts.items() for subject in some}
    for record in [*built["reporting"], *built["tuning"]]:
        rewrite = record["requested_rewrite"]
        relation, true = rewrite["relation_id"], rewrite["target_true"]["str"]
        neighbors = [s for (r, s), found in objects.items() if (r, found) == (relation, true)]
        asked = {w.replace("{}", s): s for s in neighbors for w in wordings[relation]}
        prompts = record["neighborhood_prompts"]
        assert len(set(prompts)) == len(prompts) == 10
        subjects = {asked[prompt] for prompt in prompts}  # a KeyError is a prompt about another object
        assert len(subjects) >= 3
        assert not subjects & (edited["reporting"] | edited["tuning"])


def test_every_edited_fact_is_a_record_with_a_false_target(earth, built):
    facts = {(r.id, subject): true for r in earth.relations for true, some in r.facts.items() for subject in some}
    objects = {relation.id: set(relation.facts) for relation in earth.relations}
    pools = assign_pools(earth)
    for pool in POOLS:
        found = [(rewrite["relation_id"], rewrite["subject"]) for rewrite in rewrites(built[pool])]
        assert sorted(found) == sorted(fact for fact in facts if pools[fact[1]] == pool)
        for rewrite in rewrites(built[pool]):
            true, new = rewrite["target_true"]["str"], rewrite["target_new"]["str"]
            assert true == facts[rewrite["relation_id"], rewrite["subject"]]
            assert new in objects[rewrite["relation_id"]] - {true}
    assert len(built["reporting"]) >= 600
    assert len(built["tuning"]) >= 300


def test_targets_are_spread_evenly(earth, built):
    for relation in earth.relations:
        targets = Counter(
            r["target_new"]["str"] for r in rewrites(built["reporting"]) if r["relation_id"] == relation.id
        )
        counts = [targets[name] for name in relation.facts]
        assert max(counts) - min(counts) <= 2, (relation.id, targets)


def test_paraphrases_ask_in_other_words_after_an_unrelated_sentence(earth, built):
    relations = {relation.id: relation for relation in earth.relations}
    used = Counter()
    for record in [*built["reporting"], *built["tuning"]]:
        rewrite = record["requested_rewrite"]
        subject, relation = rewrite["subject"], relations[rewrite["relation_id"]]
        others = [wording.replace("{}", subject) for wording in relation.wordings]
        starts = []
        for prompt in record["paraphrase_prompts"]:
            (start,) = [prompt.removesuffix(f" {other}") for other in others if prompt.endswith(f". {other}")]
            starts.append(start)
        assert len(set(starts)) == len(starts) == 2
        used.update(starts)
        assert [opening.replace("{}", subject) for opening in relation.openings] == record["generation_prompts"]
    assert set(used) == set(earth.sentences)


def test_the_first_records_are_a_mixture(built):
    for pool in POOLS:
        first = Counter(rewrite["relation_id"] for rewrite in rewrites(built[pool])[:50])
        assert len(first) >= 12
        assert max(first.values()) <= 15


def test_records_are_the_same_on_every_machine(built):
    assert {pool: digest(built[pool]) for pool in POOLS} == DIGESTS
    code = "from pmet_lightning.data.earth import records as r; from tests.data.test_earth import digest as d; "
    code += "import sys; sys.stdout.write(d(r('tuning')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # another hash seed
    assert done.stdout == DIGESTS["tuning"]


@pytest.mark.parametrize("pool", POOLS)
def test_names_stand_for_records_without_a_warning(pool, built, caplog):
    caplog.set_level(logging.WARNING)
    edits = read_edits(NAMES[pool])
    assert caplog.text == ""
    assert len(edits) == len(built[pool])
    assert [record for _, _, record in read_records(NAMES[pool])] == built[pool]
    assert list(stream_edits(NAMES[pool], skip=2, limit=3)) == edits[2:5]
    first, record = edits[0], built[pool][0]
    rewrite = record["requested_rewrite"]
    assert (first.subject, first.target, first.target_true) == (
        rewrite["subject"], rewrite["target_new"]["str"], rewrite["target_true"]["str"]
    )  # fmt: skip
    assert Counter(probe.kind for probe in first.probes) == {"efficacy": 1, "generalisation": 2, "specificity": 10}
    assert first.origin == f"{NAMES[pool]}, record 0"


def test_both_are_read_together():
    edits = read_edits(["earth-records", "earth-tuning"])
    assert len({edit.question for edit in edits}) == len({edit.case_id for edit in edits}) == len(edits) > 1000


def test_a_local_file_of_the_name_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "earth-records").mkdir()
    with pytest.raises(FileNotFoundError, match="no edits file 'earth-records'"):
        read_edits("earth-records")
    (tmp_path / "earth-tuning").write_text("[]")
    with pytest.raises(ValueError, match="earth-tuning: unknown ending"):
        read_edits("earth-tuning")
