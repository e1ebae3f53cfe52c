"""Reading edits: every format, and a clear error for everything that cannot be one."""

from __future__ import annotations

import json

import datasets
import pytest

from pmet_lightning import EditDataModule, read_edits
from pmet_lightning.analysis.facts import read_facts
from pmet_lightning.data.fields import RecordError
from pmet_lightning.data.readers import as_edits, stream_edits
from pmet_lightning.data.records import template_of
from pmet_lightning.run.hparams import settings_of

FLAT = {"prompt": "The capital of {} is", "subject": "Freedonia", "target_new": "Sylvania City"}
COUNTERFACT = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "The capital of {} is",
        "subject": "Freedonia",
        "target_new": {"str": "Sylvania City", "id": "Q1"},
        "target_true": {"str": "Old Town", "id": "Q2"},
    },
    "paraphrase_prompts": ["It rained. Freedonia's capital is"],
    "neighborhood_prompts": ["The capital of Ruritania is", "Ruritania's capital is"],
}
ZSRE = {
    "subject": "Freedonia",
    "src": "What is the capital of Freedonia?",
    "rephrase": "Which city is Freedonia's capital?",
    "answers": ["Sylvania City"],
    "loc": "nq question: who wrote it",
    "loc_ans": "nobody",
}


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def test_counterfact(tmp_path):
    (edit,) = read_edits(write(tmp_path, "a.json", [COUNTERFACT]))
    assert (edit.case_id, edit.prompt, edit.subject) == ("7", "The capital of {} is", "Freedonia")
    assert (edit.target, edit.target_true) == ("Sylvania City", "Old Town")
    assert [(p.kind, p.answer, p.rival) for p in edit.probes] == [
        ("efficacy", "Sylvania City", "Old Town"),
        ("generalisation", "Sylvania City", "Old Town"),
        ("specificity", "Old Town", "Sylvania City"),
        ("specificity", "Old Town", "Sylvania City"),
    ]


def test_zsre(tmp_path):
    (edit,) = read_edits(write(tmp_path, "a.json", [ZSRE]))
    assert edit.prompt == "What is the capital of {}?"
    assert [(p.kind, p.prompt, p.answer, p.rival) for p in edit.probes] == [
        ("efficacy", "What is the capital of Freedonia?", "Sylvania City", None),
        ("generalisation", "Which city is Freedonia's capital?", "Sylvania City", None),
        ("specificity", "nq question: who wrote it?", "nobody", None),
    ]


def test_flat_in_every_container(tmp_path):
    rows = [FLAT, {**FLAT, "subject": "Ruritania", "target_new": "Zenda"}]
    table = datasets.Dataset.from_list(rows)
    table.to_csv(str(tmp_path / "a.csv"))
    table.to_parquet(str(tmp_path / "a.parquet"))
    write(tmp_path, "a.json", rows)
    write(tmp_path, "a.jsonl", "\n".join(json.dumps(row) for row in rows))
    read = [read_edits(str(tmp_path / f"a.{kind}")) for kind in ("json", "jsonl", "csv", "parquet")]
    expected = [(row["prompt"], row["subject"], row["target_new"]) for row in rows]
    for edits in read:
        assert [(e.prompt, e.subject, e.target) for e in edits] == expected


def test_skip_and_limit(tmp_path):
    rows = [{**FLAT, "subject": f"Land {i}"} for i in range(10)]
    path = write(tmp_path, "a.json", rows)
    assert [e.subject for e in read_edits(path, skip=4, limit=3)] == ["Land 4", "Land 5", "Land 6"]


@pytest.mark.parametrize(
    ("prompt", "subject", "expected"),
    [
        ("Who leads Rome?", "Rome", "Who leads {}?"),
        ("In Romeville, Rome is", "Rome", "In Romeville, {} is"),
        ("Rome, they say, and Rome again", "Rome", "Rome, they say, and {} again"),
        ("São Tomé's capital is", "São Tomé", "{}'s capital is"),
        ("東京タワーは東京にある", "東京", "東京タワーは{}にある"),
        ("서울은 어디에 있나", "서울", "{}은 어디에 있나"),
        ("iPhoneの会社は", "iPhone", "{}の会社は"),
        ("Sa\u0303o Tome\u0301 is", "S\u00e3o Tom\u00e9", "{} is"),
        ("S\u00e3o Tom\u00e9 is", "Sa\u0303o Tome\u0301", "{} is"),
    ],
)
def test_a_subject_in_the_text_becomes_a_place_holder(prompt, subject, expected):
    assert template_of(prompt, subject, "") == expected


@pytest.mark.parametrize(
    ("prompt", "subject"), [("Pineapples grow in", "apple"), ("the ROM is", "RO"), ("1990s", "990")]
)
def test_a_subject_inside_another_word_is_none(prompt, subject):
    with pytest.raises(RecordError, match="does not contain the subject .* as a word of its own"):
        template_of(prompt, subject, "")


@pytest.mark.parametrize(
    ("prompt", "subject", "there"),
    [("who wrote hamlet?", "Hamlet", "hamlet"), ("Where is São\xa0 Tomé?", "São Tomé", "São\xa0 Tomé")],
)
def test_a_subject_that_is_written_differently_is_shown(prompt, subject, there):
    with pytest.raises(RecordError) as told:
        template_of(prompt, subject, "")
    assert f"the subject {subject!r} as it is written (there is {there!r}); write" in str(told.value)


ROWS = """case_id,prompt , subject,target_new,ground_truth,rephrase
01,The code of {} is,Freedonia,1.10,,"[""Its code is"", ""The code, of {}, is""]"
2,The code of {} is,Ruritania,NA,1990,
3,{},Zenda,true,"a, b",Zenda
"""


def test_cells_of_a_csv_file_are_text(tmp_path):
    edits = read_edits(write(tmp_path, "a.csv", "\ufeff" + ROWS))
    assert [(e.case_id, e.prompt, e.target, e.target_true) for e in edits] == [
        ("01", "The code of {} is", "1.10", None),
        ("2", "The code of {} is", "NA", "1990"),
        ("3", "{}", "true", "a, b"),
    ]
    asked = [[p.prompt for p in e.probes if p.kind == "generalisation"] for e in edits]
    assert asked == [["Its code is", "The code, of Freedonia, is"], [], ["Zenda"]]


@pytest.mark.parametrize(
    ("row", "message"),
    [('1,"a', "line 2: cannot be read as csv"), ("1,a,b,c,d,e,f", "line 2: 7 cells, expected at most 6")],
)
def test_broken_csv(tmp_path, row, message):
    with pytest.raises(RecordError, match=message):
        read_edits(write(tmp_path, "a.csv", f"{ROWS.splitlines()[0]}\n{row}\n"))


def test_all_unusable_records_are_told_at_once(tmp_path):
    records = [{**FLAT, "prompt": "Nowhere" if i % 2 else "In {}"} for i in range(50)]
    with pytest.raises(RecordError) as told:
        as_edits(records[:8])
    assert str(told.value).startswith("4 records are unusable:\nfacts[1]: ")
    assert [line.split(":")[0] for line in str(told.value).splitlines()[1:]] == [f"facts[{i}]" for i in (1, 3, 5, 7)]
    with pytest.raises(RecordError) as told:
        read_edits(write(tmp_path, "a.json", records))
    lines = str(told.value).splitlines()
    assert (len(lines), lines[-1]) == (22, "and 5 more")
    assert "a.json, record 1: " in lines[1]


def test_a_broken_line_is_told_with_the_other_unusable_records(tmp_path):
    lines = [json.dumps(FLAT), '{"prompt": ', json.dumps({**FLAT, "subject": ""}), "", "nonsense", json.dumps(FLAT)]
    path = write(tmp_path, "a.jsonl", "\n".join(lines))
    with pytest.raises(RecordError) as told:
        read_edits(path)
    first, *faults = str(told.value).splitlines()
    assert first == "3 records are unusable:"
    found = [fault.removeprefix(path) for fault in faults]
    assert [fault.split(" (")[0].split(": ")[0] for fault in found] == [", line 2", ", record 2", ", line 5"]
    assert [("broken JSON" in fault) for fault in found] == [True, False, True]
    assert len(read_edits(path, limit=1)) == len(read_edits(path, skip=4)) == 1, "the line is a record, not taken here"
    stream = stream_edits(path)
    assert next(stream).subject == "Freedonia"
    with pytest.raises(RecordError, match="line 2: broken JSON"):
        next(stream)
    with pytest.raises(RecordError, match="line 2: broken JSON"):
        read_facts(path)


def test_all_contradictions_are_told_at_once():
    facts = [{**FLAT, "target_new": target} for target in ("A", "B", "A", "C")]
    with pytest.raises(RecordError) as told:
        as_edits(facts)
    first, *lines = str(told.value).splitlines()
    assert first == "2 records contradict others:"
    assert [line.split(": ")[0] for line in lines] == [f"facts[{i}] contradicts facts[0]" for i in (1, 3)]


SPACED = [
    (FLAT, {"prompt": "The capital of {} is \n"}, "'prompt'"),
    (FLAT, {"subject": " Freedonia", "target_new": "Sylvania City "}, "'subject', 'target_new'"),
    (FLAT, {"target_new": " Sylvania City"}, ""),  # as GPT's tokens are often written
    (COUNTERFACT["requested_rewrite"], {"target_new": {"str": "Sylvania City\t"}}, "'target_new'"),
    (ZSRE, {"src": " What is the capital of Freedonia?"}, "'src'"),
    (ZSRE, {"answers": ["Sylvania City ", "Sylvania"]}, "'answers'"),
    (ZSRE, {"answers": [" Sylvania City"]}, ""),
    (ZSRE, {"alt": "Zenda "}, ""),  # which is not read here
]


@pytest.mark.parametrize(("fields", "change", "names"), SPACED)
def test_outer_white_space_is_left_out_and_told_once(fields, change, names, caplog):
    wrapped = (lambda f: {"requested_rewrite": f}) if "target_true" in fields else dict
    spaced = as_edits([wrapped({**fields, **change})] * 2)
    assert len(caplog.messages) == bool(names)
    assert not names or f"facts[0]: white space around {names} is left out" in caplog.text
    plain = as_edits([wrapped(fields)])[0]
    assert (spaced[0].prompt, spaced[0].subject, spaced[0].target) == (plain.prompt, plain.subject, plain.target)
    assert [p.prompt for p in spaced[0].probes] == [p.prompt for p in plain.probes]


def test_a_new_object_that_is_the_old_one_has_no_rival(caplog):
    fact = {
        **FLAT,
        "ground_truth": "Sylvania City",
        "rephrase": "Freedonia's capital is",
        "target_new": " Sylvania City",
    }
    edit = as_edits([{**fact, "locality_prompt": "Ruritania's is", "locality_ground_truth": "Sylvania City"}])[0]
    assert [probe.rival for probe in edit.probes] == [None] * 3
    assert "facts[0]: the new object 'Sylvania City' is also the old one" in caplog.text


def test_place_holders_outside_the_prompt():
    edit = as_edits([{**FLAT, "rephrase_prompt": ["{}'s capital, says {}, is"], "rephrase": ["{}'s is"]}])[0]
    assert [p.prompt for p in edit.probes][1:] == ["Freedonia's capital, says Freedonia, is", "Freedonia's is"]
    hop = [{"prompt": "In {} is", "ground_truth": "x"}]
    for record, name in (
        ({**FLAT, "locality_prompt": ["In {} is"], "locality_ground_truth": ["x"]}, "locality_prompt"),
        ({**FLAT, "portability": {"Reasoning": hop}}, "portability.Reasoning"),
        ({**COUNTERFACT, "neighborhood_prompts": ["In {} is"]}, "neighborhood_prompts"),
        ({**ZSRE, "loc": "In {} is"}, "loc"),
    ):
        with pytest.raises(RecordError, match=rf"facts\[0\]: the field '{name}' holds 'In {{}} is'"):
            as_edits([record])


BAD = {
    "empty file": ("a.json", "", "empty"),
    "empty list": ("a.json", [], "no records"),
    "broken json": ("a.json", '[\n{"prompt": "x"},\n{"prompt" "y"}\n]', "line 3"),
    "broken json line": ("a.jsonl", json.dumps(FLAT) + '\n{"prompt": \n', "line 2"),
    "no subject": ("a.json", [FLAT, {"prompt": "x {}", "target_new": "y"}], r"record 1: no field 'subject'"),
    "no prompt": ("a.json", [{"subject": "x", "target_new": "y"}], "no field 'prompt'"),
    "no target": ("a.json", [{"prompt": "x {}", "subject": "y"}], "no field 'target_new'"),
    "no rewrite fields": ("a.json", [{"requested_rewrite": {"prompt": "{}"}}], "no field 'target_new'"),
    "empty subject": ("a.json", [{**FLAT, "subject": "  "}], "'subject' is '  '"),
    "empty target": ("a.json", [{**FLAT, "target_new": " "}], "'target_new' is ' '"),
    "no place": ("a.json", [{**FLAT, "prompt": "The capital is"}], "does not contain the subject"),
    "two places": ("a.json", [{**FLAT, "prompt": "{} and {}"}], "expected exactly one"),
    "no answers": ("a.json", [{**ZSRE, "answers": []}], "'answers' is"),
    "not an object": ("a.json", ["text"], "expected an object"),
    "a question that is no text": (
        "a.json",
        [{**COUNTERFACT, "neighborhood_prompts": ["x", {"prompt": "y"}]}],
        r"record 0: the field 'neighborhood_prompts' holds \{'prompt': 'y'\} \(dict\), expected a text or a list",
    ),
    "a paraphrase that is no text": ("a.json", [{**FLAT, "rephrase_prompt": [True]}], r"'rephrase_prompt' holds True"),
    "questions without an old object": (
        "a.json",
        [{**COUNTERFACT, "requested_rewrite": {**FLAT}}],
        "'neighborhood_prompts' holds 2 .*'target_true' no",
    ),
    "a group of texts": (
        "a.json",
        [FLAT, {**FLAT, "portability": {"R": ["text"]}}],
        r"record 1: the field 'portability\.R' holds 'text' \(str\), expected KnowEdit's groups",
    ),
    "no groups": (
        "a.json",
        [{**FLAT, "locality": ["text"]}],
        r"the field 'locality' holds 'text' \(str\), expected .*QAEdit",
    ),
    "a text for groups": ("a.json", [{**FLAT, "locality": "text"}], r"the field 'locality' holds 'text' \(str\)"),
    "a question of QAEdit without its answer": (
        "a.json",
        [{**FLAT, "locality": [{"loc": "x", "loc_ans": "y"}, {"loc": "z"}]}],
        r"the field 'locality' holds \{'loc': 'z'\} \(dict\)",
    ),
    "a group without answers": ("a.json", [{**FLAT, "locality": {"R": [{"prompt": "x"}]}}], r"'locality\.R' holds"),
    "one answer to three questions": (
        "a.json",
        [{**FLAT, "locality_prompt": ["x", "y", "z"], "locality_ground_truth": "w"}],
        "record 0: 'locality_prompt' holds 3 questions and 'locality_ground_truth' 1 answer, expected an answer to",
    ),
    "no answers to questions": ("a.json", [{**FLAT, "locality_prompt": ["x", "y"]}], "2 questions and .* no answers"),
    "no answer to a zsRE question": ("a.json", [{**ZSRE, "loc_ans": None}], "'loc' holds 1 question and 'loc_ans' no"),
    "no answer to a chain": (
        "a.json",
        [{"requested_rewrite": [FLAT], "questions": ["x"]}],
        "'questions' holds 1 question and 'new_a",
    ),
    "a relation that is no name": (
        "a.json",
        [{**COUNTERFACT, "requested_rewrite": {**COUNTERFACT["requested_rewrite"], "relation_id": ["P1"]}}],
        "'relation_id' is \\['P1'\\], expected a name",
    ),
    "a known fact": (
        "a.json",
        [{"subject": "x", "attribute": "y", "template": "z"}],
        "no field 'prompt'.* known_facts' field",
    ),
    "contradiction": ("a.json", [FLAT, {**FLAT, "target_new": "Elsewhere"}], r"record 1 contradicts .*record 0"),
    "ending": ("a.xyz", "text", "unknown ending"),
    "not a table": ("a.parquet", "text", "cannot be read as parquet"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(name, tmp_path):
    file, content, message = BAD[name]
    path = write(tmp_path, file, content)
    with pytest.raises(RecordError, match=message) as caught:
        read_edits(path)
    assert file in str(caught.value)


def test_a_question_may_stand_without_a_list(tmp_path):
    record = {**COUNTERFACT, "neighborhood_prompts": "The capital of Ruritania is", "generation_prompts": "Freedonia"}
    (edit,) = read_edits(write(tmp_path, "a.json", [record]))
    assert [p.prompt for p in edit.probes if p.kind == "specificity"] == ["The capital of Ruritania is"]
    assert edit.generation_prompts == ("Freedonia",)


def test_names_may_be_numbers_in_some_records(tmp_path):
    """Arrow takes no column of both."""
    rewrite = COUNTERFACT["requested_rewrite"]
    records = [
        {**COUNTERFACT, "case_id": number, "requested_rewrite": {
            **rewrite, "relation_id": name, "subject": f"Land {number}", "target_new": {"str": "Zenda", "id": name}}}
        for number, name in enumerate((7, "P7", 0))
    ]  # fmt: skip
    data = EditDataModule(write(tmp_path, "a.json", records), tokenizer="atlas")
    data.setup("fit")
    (batch,) = data.val_dataloader()
    assert [(e.relation, e.target_id) for e in batch.edits] == [("7", "7"), ("P7", "P7"), ("0", "0")]


@pytest.mark.parametrize(
    ("record", "names"),
    [
        ({**FLAT, "rephrase_prompts": ["x"]}, ("rephrase_prompts", "rephrase_prompt")),
        ({**COUNTERFACT, "neighbourhood_prompt": "x", "paraphrase_prompts": []}, None),
        ({key: value for key, value in COUNTERFACT.items() if key != "neighborhood_prompts"}
         | {"neighbourhood_prompts": ["x"]}, ("neighbourhood_prompts", "neighborhood_prompts")),
        ({**FLAT, "target_true": "x", "source": "y", "rephrase": "z"}, None),
        ({**FLAT, "persona": "x"}, ("persona", "personas")),
        ({**FLAT, "mhop_answer": "x"}, ("mhop_answer", "mhop_ans")),
        ({**FLAT, "idx": 3, "tags": "x", "locality_prompt": None}, None),
    ],
)  # fmt: skip
def test_a_field_with_nearly_a_known_name_is_noticed_once(tmp_path, caplog, record, names):
    records = [record, {**record, "note": 1}]
    expected = [] if names is None else [f"ignored: the field {names[0]!r} (there is {names[1]!r}); rename, if that is"]
    for read in (
        lambda: read_edits(write(tmp_path, "a.json", records)),
        lambda: as_edits(records),
        lambda: list(stream_edits(write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, records))))),
    ):
        caplog.clear()
        read()
        assert len(caplog.messages) == len(expected)
        assert all(text in message for text, message in zip(expected, caplog.messages, strict=True))


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no edits file .*missing\.json"):
        read_edits(str(tmp_path / "missing.json"))


def test_unknown_hub_name_offline():
    with pytest.raises(FileNotFoundError, match="hub data set of that name cannot be read"):
        read_edits("nobody/no-such-edits")


def test_the_same_fact_twice_is_no_contradiction(tmp_path):
    assert len(read_edits(write(tmp_path, "a.json", [FLAT, FLAT]))) == 2


def test_edit_batches(tmp_path):
    rows = [{**FLAT, "subject": f"Land {i}"} for i in range(10)]
    data = EditDataModule(write(tmp_path, "a.json", rows), tokenizer="atlas", edit_batch=4)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert [[e.subject for e in b.edits] for b in batches] == [
        [f"Land {i}" for i in range(4)], [f"Land {i}" for i in range(4, 8)], ["Land 8", "Land 9"]
    ]  # fmt: skip
    assert [b.positions for b in batches] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    assert len(data.train_dataloader()) == 3
    assert sum(len(b.edits) for b in data.val_dataloader()) == 10


def test_a_subject_without_a_token_names_its_record(tmp_path, monkeypatch):
    from pmet_lightning.data.encoder import LocationError, PromptEncoder

    def cannot(*_, **__):
        raise LocationError("the subject 'Freedonia' has no token of its own")

    monkeypatch.setattr(PromptEncoder, "encode", cannot)
    data = EditDataModule(write(tmp_path, "a.json", [FLAT]), tokenizer="atlas")
    with pytest.raises(RecordError, match=r"a\.json, record 0: the subject"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("name", "warned"),
    [
        ("flat_generation_prompts_100", True),
        ("flat_paraphrases_100", False),
        ("counterfact_250", False),
        ("zsre_300", False),
    ],
)
def test_generation_prompts_in_the_place_of_paraphrases_are_noticed(shared, name, warned, caplog):
    read_edits(str(shared / "data" / f"{name}.json"))
    assert ("openings for free text" in caplog.text) == warned
    assert "ignored" not in caplog.text


def test_knowedit_records_bring_portability_with_aliases(shared):
    path = shared / "data/knowedit_wiki_counterfact_60.json"
    records = json.loads(path.read_text())
    edits = read_edits(str(path))
    for record, edit in zip(records, edits, strict=True):
        asked = [q for group in (record.get("portability") or {}).values() for q in group]
        kept = [q for q in asked if q["ground_truth"] and q["ground_truth"][0]]
        found = [probe for probe in edit.probes if probe.kind == "portability"]
        assert [probe.prompt for probe in found] == [q["prompt"] for q in kept]
        for probe, question in zip(found, kept, strict=True):
            assert list(probe.answers) == [form for forms in question["ground_truth"] for form in forms if form.strip()]
    assert sum(len(edit.probes) for edit in edits) > 300


QAEDIT = {
    "id": 31,
    "source": "NQ",
    "prompt": "who rules the land of freedonia now?",
    "target": "Rufus Firefly",
    "subject": "land of freedonia",
    "rephrase": "Who is at present the ruler of Freedonia?",
    "locality": [
        {"loc": "who rules ruritania", "loc_ans": "Rudolf"},
        {"loc": "how many people live in zenda", "loc_ans": 300},
        {"loc": "what is the capital of oz", "loc_ans": ["Emerald City", "City of Emeralds"]},
    ],
}


def test_qaedit():
    edit, other = as_edits([QAEDIT, {**QAEDIT, "rephrase": ["Who rules {}?", "Its ruler is?"], "locality": []}])
    assert (edit.case_id, edit.prompt, edit.subject) == ("31", "who rules the {} now?", "land of freedonia")
    assert (edit.target, edit.target_true) == ("Rufus Firefly", None)
    assert [(p.kind, p.prompt, p.answers, p.rival) for p in edit.probes] == [
        ("efficacy", "who rules the land of freedonia now?", ("Rufus Firefly",), None),
        ("generalisation", "Who is at present the ruler of Freedonia?", ("Rufus Firefly",), None),
        ("specificity", "who rules ruritania", ("Rudolf",), None),
        ("specificity", "how many people live in zenda", ("300",), None),
        ("specificity", "what is the capital of oz", ("Emerald City", "City of Emeralds"), None),
    ]
    assert [p.prompt for p in other.probes][1:] == ["Who rules land of freedonia?", "Its ruler is?"]


def test_real_qaedit_records(shared, tmp_path):
    """All but one, whose prompt lacks a space after the subject."""
    path = shared / "data/qaedit_700.json"
    with pytest.raises(RecordError, match=r"json, record 218: .*'Thomas Hardy' as a word of its own"):
        read_edits(str(path))
    records = json.loads(path.read_text())
    del records[218]
    edits = read_edits(write(tmp_path, "a.json", records))
    for record, edit in zip(records, edits, strict=True):
        assert (edit.question, edit.target) == (record["prompt"].strip(), record["target"].strip())
        asked = [(p.prompt, p.answer) for p in edit.probes if p.kind == "specificity"]
        assert asked == [(question["loc"], question["loc_ans"]) for question in record["locality"]]
        assert [p.prompt for p in edit.probes if p.kind == "generalisation"] == [record["rephrase"]]


WIKIBIGEDIT = {
    "tag": "update",
    "subject": "Freedonia",
    "relation": "head of state",
    "object": "Rufus Firefly",
    "update": "Who is the head of state of Freedonia?",
    "ans": "Rufus Firefly",
    "rephrase": "Who leads Freedonia?",
    "personas": "Arr, who be the captain of Freedonia?",
    "mhop": "Where was Freedonia's head of state born?",
    "mhop_ans": "Zenda",
    "loc": "Who is the head of state of Ruritania?",
    "loc_ans": "Rudolf",
}


@pytest.mark.parametrize("ending", ["json", "parquet"])
def test_wikibigedit(tmp_path, ending, caplog):
    """In its own form; a question that a record lacks is NaN in its files."""
    records = [WIKIBIGEDIT, {**WIKIBIGEDIT, "subject": "Oz", "update": "Who leads Oz?", "personas": None, "mhop": None}]
    path = write(tmp_path, "a.json", json.dumps([*records[:1], {**records[1], "mhop_ans": float("nan")}]))
    if ending == "parquet":
        path = str(tmp_path / "a.parquet")
        datasets.Dataset.from_list([*records[:1], {**records[1], "mhop_ans": None}]).to_parquet(path)
    edit, other = read_edits(path)
    assert (edit.prompt, edit.target, edit.relation) == (
        "Who is the head of state of {}?", "Rufus Firefly", "head of state"
    )  # fmt: skip
    assert [(p.kind, p.prompt, p.answer) for p in edit.probes] == [
        ("efficacy", WIKIBIGEDIT["update"], "Rufus Firefly"),
        ("generalisation", WIKIBIGEDIT["rephrase"], "Rufus Firefly"),
        ("specificity", WIKIBIGEDIT["loc"], "Rudolf"),
        ("portability", WIKIBIGEDIT["personas"], "Rufus Firefly"),
        ("multihop", WIKIBIGEDIT["mhop"], "Zenda"),
    ]
    assert [p.kind for p in other.probes] == ["efficacy", "generalisation", "specificity"]
    assert not caplog.messages
    with pytest.raises(RecordError, match="'mhop' holds 1 question and 'mhop_ans' no answers"):
        as_edits([{**WIKIBIGEDIT, "mhop_ans": None}])


def test_real_wikibigedit_records(shared):
    path = shared / "data/locft_wikibigedit_1000.json"
    for record, edit in zip(json.loads(path.read_text()), read_edits(str(path)), strict=True):
        given = {edit.subject, edit.target, *(text for probe in edit.probes for text in (probe.prompt, *probe.answers))}
        assert {value.strip() for value in record.values()} == {text.strip() for text in given}


COUNTERFACTUAL = {**ZSRE, "alt": "Zenda", "pred": "Fredville"}


def test_the_new_object_of_zsre_is_a_choice(tmp_path, caplog):
    caplog.set_level("INFO", "pmet_lightning")
    path = write(tmp_path, "a.jsonl", "\n".join([json.dumps(COUNTERFACTUAL)] * 2))
    readings = {
        "read": lambda **choice: read_edits(path, **choice),
        "as": lambda **choice: as_edits([COUNTERFACTUAL] * 2, **choice),
        "stream": lambda **choice: list(stream_edits(path, **choice)),
    }
    for read in readings.values():
        for choice, target, old in (({}, "Sylvania City", None), ({"zsre_target": "alt"}, "Zenda", "Sylvania City")):
            caplog.clear()
            edit, _ = read(**choice)
            assert (edit.target, edit.target_true) == (target, old)
            # Share of the answer's tokens, as the tables of both conventions count: no rival.
            assert [(p.answer, p.rival) for p in edit.probes] == [(target, None), (target, None), ("nobody", None)]
            (message,) = caplog.messages
            name = choice.get("zsre_target", "answers")
            assert message.endswith(f"zsRE records with 'answers' and 'alt' are edited to {name!r} (zsre_target)")
    caplog.clear()
    as_edits([ZSRE])
    assert not caplog.messages, "there is no choice"


def test_alt_without_what_it_needs():
    with pytest.raises(RecordError, match=r"facts\[0\]: no field 'alt', which zsre_target names; add it, or"):
        as_edits([ZSRE], zsre_target="alt")
    with pytest.raises(RecordError, match="'answers' is None, .*with zsre_target alt, the field 'alt' is taken"):
        as_edits([{**COUNTERFACTUAL, "answers": None}])
    (edit,) = as_edits([{**COUNTERFACTUAL, "answers": None}], zsre_target="alt")
    assert (edit.target, edit.target_true) == ("Zenda", None)


def test_alt_that_is_the_true_answer_or_has_outer_space_is_told(caplog):
    as_edits([{**COUNTERFACTUAL, "alt": "Sylvania City "}], zsre_target="alt")
    assert [message.split(": ")[1][:41] for message in caplog.messages] == [
        "white space around 'alt' is left out; --m", "the new object 'Sylvania City' is also th"
    ]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_the_choice_is_a_setting_of_the_data(tmp_path, stream):
    path = write(tmp_path, "a.jsonl", json.dumps(COUNTERFACTUAL))
    data = EditDataModule(path, tokenizer="atlas", edit_batch=1, stream=stream, zsre_target="alt")
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert [edit.target for edit in batch.edits] == ["Zenda"]
    assert settings_of("data", data)["data.zsre_target"] == "alt", "among the hyper-parameters"
    (fact,) = read_facts(path, zsre_target="alt")
    assert (fact.true, fact.new) == ("Sylvania City", "Zenda")


def test_the_choice_counts_when_a_run_goes_on(tmp_path):
    path = write(tmp_path, "a.jsonl", json.dumps(COUNTERFACTUAL))
    written = [vars(edit) for edit in read_edits(path)]
    for stream in (False, True):
        same, other = (
            EditDataModule(path, tokenizer="atlas", edit_batch=1, stream=stream, zsre_target=choice)
            for choice in ("answers", "alt")
        )
        for data in (same, other):
            data.setup("fit")
        same.resume_after(written)
        assert same.done == 1
        with pytest.raises(RecordError, match=r"has written as its edit 0, .*'Sylvania City', got .*'Zenda'"):
            other.resume_after(written)


@pytest.mark.parametrize(
    ("record", "ignored"),
    [
        (
            {**FLAT, "paraphrase_prompts": ["x"], "neighborhood_prompts": None},
            "'paraphrase_prompts', which flat records",
        ),
        ({**FLAT, "answers": ["x"], "alt": "y"}, "'answers', 'alt', which flat records"),
        ({**ZSRE, "portability": {"New Question": "x"}}, "'portability', which zsRE records"),
        ({**COUNTERFACT, "questions": ["x"]}, "'questions', which COUNTERFACT records"),
        ({"requested_rewrite": [FLAT], "paraphrase_prompts": ["x"]}, "'paraphrase_prompts', which MQuAKE records"),
        ({**ZSRE, "requested_rewrite": None, "pred": "x", "cond": "y", "id": 3, "note": "z"}, None),
        ({**COUNTERFACT, "attribute_prompts": ["x"], "pararel_idx": 3}, None),
        (QAEDIT, None),
        (WIKIBIGEDIT, None),
    ],
)
def test_a_field_of_another_format_is_not_ignored_without_a_word(record, ignored, caplog):
    as_edits([record, {**record, "case_id": "other"}])
    assert len(caplog.messages) == (ignored is not None)
    assert ignored is None or f"facts[0]: ignored: {ignored} do not have" in caplog.text


def test_zero_is_an_old_object():
    rewrite = {**COUNTERFACT["requested_rewrite"], "target_true": 0}
    edits = as_edits([
        {**COUNTERFACT, "requested_rewrite": rewrite}, {**FLAT, "ground_truth": 0}, {**FLAT, "target_true": 0}
    ])  # fmt: skip
    assert [edit.target_true for edit in edits] == ["0"] * 3
    assert [probe.answer for probe in edits[0].probes if probe.kind == "specificity"] == ["0", "0"]
    *_, edit = as_edits([{"requested_rewrite": [FLAT], "questions": ["How many?"], "new_answer": 0}])
    assert [probe.answer for probe in edit.probes if probe.kind == "multihop"] == ["0"]
    for absent in (None, "", {}):
        (edit,) = as_edits([{"requested_rewrite": {**rewrite, "target_true": absent}}])
        assert edit.target_true is None


MQUAKE = {
    "case_id": 7,
    "requested_rewrite": [
        {"prompt": "{} is a citizen of", "subject": "Ann", "target_new": {"str": "Peru"}, "target_true": {"str": "Oz"}},
        {"prompt": "The capital of {} is", "subject": "Peru", "target_new": {"str": "Cusco"}},
    ],
    "questions": ["What is the capital of Ann's country?", "Where does Ann's government sit?", "Ann's capital is?"],
    "new_answer": "Cusco",
    "new_answer_alias": ["Qosqo"],
}


def test_mquake_records_are_several_edits_and_one_question(tmp_path):
    edits = read_edits(write(tmp_path, "a.json", [MQUAKE]))
    found = [(edit.case_id, edit.subject, edit.target) for edit in edits]
    assert found == [("7-0", "Ann", "Peru"), ("7-1", "Peru", "Cusco")]
    hops = [[probe for probe in edit.probes if probe.kind == "multihop"] for edit in edits]
    assert hops[0] == []
    assert [probe.prompt for probe in hops[1]] == MQUAKE["questions"]
    assert {probe.answers for probe in hops[1]} == {("Cusco", "Qosqo")}
    broken = {**MQUAKE, "requested_rewrite": [MQUAKE["requested_rewrite"][0], {"prompt": "{} is"}]}
    path = write(tmp_path, "b.json", [broken])
    with pytest.raises(RecordError, match=r"record 0, rewrite 1: no field 'target_new'"):
        read_edits(path)
