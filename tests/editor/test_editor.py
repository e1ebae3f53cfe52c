"""``Editor``: the command line in Python. It gives the same bits, and leaves everything else as it was."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GPTJForCausalLM

from pmet_lightning import Editor, TargetOptimizer, read_edits
from pmet_lightning.cli.dispatch import main
from pmet_lightning.data.fields import RecordError
from pmet_lightning.editor.settings import EditorSettings, ModelSettings
from pmet_lightning.evaluation.editable import EditableModel
from pmet_lightning.model.patch import PatchError, load_patch
from pmet_lightning.moments.store import MomentError
from pmet_lightning.run import ledger as ledger_module
from pmet_lightning.run.lightning_cli import build_fit, run_command
from pmet_lightning.utils.files import write_json
from tests.harness import as_arguments, matrices, tiny_settings
from tests.tiny import CONFIGS, RECORDS, save_tiny

FACTS = RECORDS[:4]
SETTINGS = {"layers": [1, 2], "steps": 4, "free_tokens": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with tiny models of three families, a corpus and second moments that are kept."""
    folder = tmp_path_factory.mktemp("interface")
    for family in ("gpt2", "gptj", "llama"):
        save_tiny(family, folder / family)
    (folder / "corpus.txt").write_text(
        "\n".join(f"This is the text of number {i}, and it is short." for i in range(40))
    )
    return folder


@pytest.fixture
def make(base):
    """Makes an editor of a tiny model that is loaded as a program would, and gives both."""

    def made(family="gptj", model=None, **settings):
        model = AutoModelForCausalLM.from_pretrained(base / family) if model is None else model
        tokenizer = AutoTokenizer.from_pretrained(base / family)
        options = {
            "corpus": str(base / "corpus.txt"), "lam": 50, "lr": 0.5,
            "moments": {"samples": 40, "folder": str(base / "moments")}, **SETTINGS,
        }  # fmt: skip
        return Editor(model, tokenizer, **(options | settings)), model

    return made


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", ["gptj", "llama"])
def test_it_is_the_command_line(base, tmp_path, family):
    """Patch, ledger, scores and what is edited: by a configuration from the shell, and by one call."""
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(FACTS))
    settings = tiny_settings(tmp_path, str(base / family)) | {
        "model.layers": [1, 2], "data.path": str(path), "data.edit_batch": 2, "model.free_tokens": 2,
        "moments.samples": 40, "moments.folder": str(base / "moments"),
    }  # fmt: skip
    main(["fit", "--config", "pmet.yaml", *as_arguments(settings)])
    ledger = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    patched, manifest = load_patch(tmp_path / "run" / "patch.safetensors")
    deltas = matrices(patched)

    model = AutoModelForCausalLM.from_pretrained(base / family)
    clean = bits(model)
    editor = Editor.from_config(
        "pmet.yaml", model, AutoTokenizer.from_pretrained(base / family), corpus=str(tmp_path / "corpus.txt"),
        edit_batch=2, moments={"samples": 40, "folder": str(base / "moments")}, **SETTINGS,
    )  # fmt: skip
    report = editor.edit(FACTS)
    editor.save_patch(tmp_path / "patch.safetensors")
    mine, own = load_patch(tmp_path / "patch.safetensors")
    assert same(deltas, matrices(mine))
    assert {**own, "model": ""} == {**manifest, "model": ""}
    assert list(report.edits) == ledger
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert report.scores == {phase: scores[phase] for phase in ("before", "after")}
    for name, tensor in model.state_dict().items():
        if name not in deltas:
            assert torch.equal(tensor, clean[name]), name
        else:
            torch.testing.assert_close(tensor, clean[name] + deltas[name], rtol=0, atol=1e-6)


def test_a_configuration_may_leave_the_model_to_be_given(base):
    given = {"corpus": str(base / "corpus.txt"), "layers": [1, 2]}
    model = AutoModelForCausalLM.from_pretrained(base / "llama")
    editor = Editor.from_config("your-model.yaml", model, AutoTokenizer.from_pretrained(base / "llama"), **given)
    assert editor.layers == [1, 2]
    with pytest.raises(ValueError, match="your-model.yaml names no model; give one"):
        Editor.from_config("your-model.yaml")


def test_settings_for_a_stream_of_edits_do_for_lists_of_them():
    editor = Editor.from_config("stream.yaml", moments={"samples": 50}, device="cpu")
    facts = read_edits("atlas-records", limit=2)
    for fact in facts:
        editor.edit([fact], evaluate=False)
    assert editor.edits_written == 2


def test_validate_is_evaluate(base, tmp_path, make, caplog):
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(FACTS))
    config = tmp_path / "config.yaml"
    config.write_text("model: {layers: [1, 2], free_tokens: 2}\ntrainer: {accelerator: cpu, logger: false}")
    paths = {"model.model_name": str(base / "gptj"), "data.path": str(path), "trainer.run_dir": str(tmp_path / "run")}
    cli = build_fit(str(config), {**paths, "trainer.enable_progress_bar": False})
    cli.trainer.validate(cli.model, cli.datamodule)
    editor, _ = make()
    assert editor.evaluate(FACTS) == editor.evaluate(path) == cli.model.results["validate"]


@pytest.mark.parametrize("arguments", [[], ["predict"], ["--config", "pmet.yaml"]], ids=str)
def test_a_command_that_is_none_is_named(arguments):
    with pytest.raises(
        ValueError, match=r"unknown command '.*', expected one of fit, validate, test, stats, finetune, retrieve"
    ):
        run_command("".join(arguments[:1]), arguments[1:])


def test_no_setting_has_a_default_of_its_own(base, tmp_path, monkeypatch):
    """An editor without settings is the command line without options."""
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text("data: {path: none.json}")
    cli = build_fit(str(config), {"model.model_name": str(base / "gptj")})
    editor = Editor(str(base / "gptj"), device="cpu")
    module, spread, moments = editor._module, editor._spread, editor._moments
    theirs = {type(c).__name__: c for c in cli.trainer.callbacks}
    assert module.rules == cli.model.rules
    names = ["context_count", "context_length", "seed", "micro_batch", "tokens_per_batch", "free_tokens", "chat",
             "targets_folder", "padding_side", "keep_float32", "layers_wanted", "optimized_sites"]  # fmt: skip
    for name in names:
        assert getattr(module, name) == getattr(cli.model, name), name
    for optimizer in (o.optimizer_callable([torch.nn.Parameter(torch.zeros(1))]) for o in (module, cli.model)):
        assert (type(optimizer), optimizer.defaults["lr"]) == (torch.optim.Adam, 0.2)
    assert spread.hparams == theirs["WeightSpread"].hparams
    assert moments.hparams == theirs["SecondMoments"].hparams
    assert editor._data_settings["edit_batch"] is cli.datamodule.edit_batch is None
    assert editor._data_settings["evaluation_batch"] == cli.datamodule.evaluation_batch
    assert editor._drift.hparams == theirs["Drift"].hparams


@pytest.mark.parametrize("spread", [{}, {"protect_past": True}])
def test_later_calls_are_further_edit_batches(make, spread):
    """Two calls with half of the facts each, against one call with two edit batches: bit for bit."""
    one, model = make(edit_batch=2, spread=spread)
    at_once = one.edit(FACTS, evaluate=False)
    two, other = make(spread=spread)
    parts = [two.edit(FACTS[:2], evaluate=False), two.edit(FACTS[2:], evaluate=False)]
    assert same(bits(model), bits(other))
    assert [*parts[0].edits, *parts[1].edits] == [
        line | {"case_id": str(i % 2)} for i, line in enumerate(at_once.edits)
    ]
    assert [line["edit_batch"] for part in parts for line in part.edits] == [0, 0, 1, 1]
    assert two.edits_written == 4
    assert "4 edits written in 2 edit batches" in str(at_once)


def test_keys_that_were_not_kept_are_measured_again(make, base, tmp_path, caplog):
    """A patch of one call and a second call, against two calls: below the one edited layer nothing has changed."""
    at_once, _ = make(layers=[1])
    alone, _ = make(layers=[1], spread={"protect_past": False})
    for facts in (FACTS[:2], FACTS[2:]):
        at_once.edit(facts, evaluate=False)
        alone.edit(facts, evaluate=False)
    first, _ = make(layers=[1])
    first.edit(FACTS[:2], evaluate=False)
    first.save_patch(tmp_path / "patch.safetensors")
    assert not list(tmp_path.glob("*-past-*"))
    later = Editor.from_patch(
        tmp_path / "patch.safetensors", AutoModelForCausalLM.from_pretrained(base / "gptj"),
        AutoTokenizer.from_pretrained(base / "gptj"), moments_folder=base / "moments",
    )  # fmt: skip
    with caplog.at_level(logging.INFO):
        later.edit(FACTS[2:], evaluate=False)
    assert caplog.text.count("measuring the keys of 2 facts") == 1
    found, expected, other = (matrices(editor._spread.edited.deltas) for editor in (later, at_once, alone))
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, rtol=1e-3, atol=1e-5)
        assert not torch.allclose(other[name], delta, rtol=1e-2, atol=1e-4), "protection does something"
    keys = later._spread.edited.past_keys
    assert {place: len(rows) for place, rows in keys.items()} == {("ffn", 1): 4}, "from here on they are kept"


def test_kept_targets_are_not_those_of_other_weights(make, tmp_path):
    """The second call finds the same edits in the folder of targets, but of the model before the first."""
    plain, model = make()
    kept, other = make(targets_folder=str(tmp_path))
    for editor in (plain, kept):
        editor.edit(FACTS[:1], evaluate=False)
        editor.edit(FACTS[:1], evaluate=False)
    assert same(bits(model), bits(other))


def test_undo_and_revert_are_exact(make, tmp_path):
    editor, model = make()
    clean = bits(model)
    editor.edit(FACTS[:2], evaluate=False)
    first, patch = bits(model), matrices(editor._spread.edited.deltas)
    editor.edit(FACTS[2:], evaluate=False)
    assert not same(first, bits(model))
    editor.undo()
    assert same(first, bits(model))
    assert same(patch, matrices(editor._spread.edited.deltas))
    second = editor.edit(FACTS[2:], evaluate=False)
    assert second.edits[0]["edit_batch"] == 1
    editor.revert()
    assert same(clean, bits(model))
    assert editor.edits_written == 0
    with pytest.raises(ValueError, match="nothing has been edited"):
        editor.save_patch(tmp_path / "p.safetensors")
    editor.edit(FACTS[:2], evaluate=False)
    assert same(first, bits(model))


def test_saved_folder_and_patch_are_the_edited_model(base, make, tmp_path):
    editor, model = make()
    editor.edit(FACTS, evaluate=False)
    editor.save(tmp_path / "edited")
    assert same(bits(model), bits(AutoModelForCausalLM.from_pretrained(tmp_path / "edited")))
    assert AutoTokenizer.from_pretrained(tmp_path / "edited").vocab_size == editor.tokenizer.vocab_size
    with pytest.raises(FileExistsError, match="new or empty folder"):
        editor.save(tmp_path / "edited")
    editor.save_patch(tmp_path / "patch.safetensors")
    main(["export", "--run", str(tmp_path / "patch.safetensors"), "--out", str(tmp_path / "exported")])
    assert same(bits(model), bits(AutoModelForCausalLM.from_pretrained(tmp_path / "exported")))
    patched, _ = make(patch=str(tmp_path / "patch.safetensors"))
    assert same(bits(model), bits(patched.model))


def surroundings(model, folder):
    """Everything that a program may rely on."""
    loggers = [
        logging.getLogger(),
        *(logging.getLogger(n) for n in ("lightning.pytorch", "lightning.fabric", "pmet_lightning")),
    ]
    return {
        "torch": torch.get_rng_state().tolist(), "python": random.getstate(), "numpy": str(np.random.get_state()),
        "dtype": torch.get_default_dtype(), "threads": torch.get_num_threads(), "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(), "cudnn": torch.backends.cudnn.benchmark,
        "environment": dict(os.environ), "files": sorted(folder.rglob("*")),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "loggers": [(logger.level, list(logger.handlers), logger.propagate) for logger in loggers],
        "warnings": list(warnings.filters),
        "modes": [module.training for module in model.modules()],
        "flags": [(p.requires_grad, p.grad is None, p.dtype, p.device) for p in model.parameters()],
        "objects": [id(p) for p in model.parameters()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "forward": ["forward" in vars(m) for m in model.modules()],
    }  # fmt: skip


def test_nothing_else_is_changed_or_printed(make, tmp_path, monkeypatch, capfd):
    """Not even what the model is doing: half of it is in training mode, and some weights want gradients."""
    monkeypatch.chdir(tmp_path)
    editor, model = make("gpt2")
    editor.edit(FACTS[:1], evaluate=False)  # imports and the like
    model.train()
    model.transformer.h[0].eval()
    model.transformer.h[1].requires_grad_(False)
    before = surroundings(model, tmp_path)
    capfd.readouterr()
    editor.edit(FACTS[1:3])
    editor.evaluate(FACTS)
    editor.ask(["The mother tongue"])
    editor.revert()
    after = surroundings(model, tmp_path)
    assert {name for name in before if before[name] != after[name]} == set()
    assert capfd.readouterr() == ("", "")


def test_it_edits_whatever_mode_the_program_is_in(make):
    """Dropout is off, and gradients are there, also where the program has switched them off."""
    editor, model = make("gpt2")
    editor.edit(FACTS[:2], evaluate=False)
    expected = bits(model)
    editor.revert()
    model.train()
    with torch.no_grad():
        editor.edit(FACTS[:2])
    assert same(expected, bits(model))
    model.eval()
    editor.revert()
    model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    assert model.transformer.h[1].mlp.c_proj.weight.grad is not None, "the program goes on training"


def test_a_run_folder_and_progress_where_asked_for(make, tmp_path, capfd):
    editor, _ = make(progress=True)
    editor.edit(FACTS[:1], evaluate=False)
    report = editor.edit(FACTS[1:3], run_dir=str(tmp_path / "run"))
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"ledger.jsonl", "patch.safetensors", "report.html", "scores.json", "state.json"} <= names
    lines = (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == list(report.edits)
    patched, manifest = load_patch(tmp_path / "run" / "patch.safetensors")
    deltas = matrices(patched)
    assert same(deltas, matrices(editor._spread.edited.deltas))
    assert (manifest["edit_batches"], manifest["edits"]) == (2, 3)
    assert "Targets" in "".join(capfd.readouterr())


@pytest.mark.parametrize("with_folder", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("the disk is full")], ids=str)
def test_what_fails_or_is_interrupted_writes_nothing(make, monkeypatch, tmp_path, error, with_folder):
    """In the second of two edit batches, after the first was written."""
    editor, model = make(edit_batch=1)
    editor.edit(FACTS[2:3], evaluate=False)
    before, deltas, handler = bits(model), matrices(editor._spread.edited.deltas), signal.getsignal(signal.SIGINT)
    calls, measure_ledger = [], ledger_module.measure_ledger

    def fail(*given):
        calls.append(given)
        if len(calls) == 2:
            raise error
        return measure_ledger(*given)

    with monkeypatch.context() as patched:
        patched.setattr(ledger_module, "measure_ledger", fail)
        with pytest.raises(error if isinstance(error, type) else type(error)):
            editor.edit(FACTS[:2], evaluate=False, run_dir=tmp_path / "run" if with_folder else None)
    assert len(calls) == 2
    assert same(before, bits(model))
    assert same(deltas, matrices(editor._spread.edited.deltas))
    assert signal.getsignal(signal.SIGINT) is handler
    editor.edit(FACTS[:2], evaluate=False)
    twin, other = make(edit_batch=1)
    twin.edit([FACTS[2], *FACTS[:2]], evaluate=False)
    assert same(bits(model), bits(other)), "as if nothing had happened"


@pytest.mark.parametrize("with_folder", [False, True])
def test_an_edit_batch_is_measured_once(make, monkeypatch, tmp_path, with_folder):
    editor, _ = make(edit_batch=1)
    calls, measure_ledger = [], ledger_module.measure_ledger
    monkeypatch.setattr(ledger_module, "measure_ledger", lambda *given: calls.append(1) or measure_ledger(*given))
    report = editor.edit(FACTS[:2], evaluate=False, run_dir=str(tmp_path / "run") if with_folder else None)
    assert len(calls) == len(report.edits) == 2
    if with_folder:
        lines = (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == list(report.edits), "the same ones"


def test_a_limit_takes_the_batch_back_and_says_so(make):
    editor, model = make(drift={"max_growth": 1e-6})
    clean = bits(model)
    report = editor.edit(FACTS[:2], evaluate=False)
    assert "growth" in report.ended
    assert report.ended in str(report)
    assert (report.edits, editor.edits_written) == ((), 0)
    assert same(clean, bits(model))


def test_moments_are_never_those_of_an_edited_model(make, tmp_path):
    """Not after an edit, when the files of the unedited one are gone; and a patched model has moments of its own."""
    editor, model = make(moments={"samples": 40, "folder": str(tmp_path / "moments")})
    editor.edit(FACTS[:1], evaluate=False)
    first = bits(model)
    shutil.rmtree(tmp_path / "moments")
    with pytest.raises(MomentError, match="take the edits back"):
        editor.edit(FACTS[1:2], evaluate=False)
    assert same(first, bits(model))
    editor.save_patch(tmp_path / "patch.safetensors")
    editor.revert()
    editor.edit(FACTS[:1], evaluate=False)
    assert same(first, bits(model)), "collected again"
    patched, other = make(patch=str(tmp_path / "patch.safetensors"))
    assert same(first, bits(other))
    assert patched._moments.key(patched._module) != editor._moments.key(editor._module)
    patched.edit(FACTS[1:2], evaluate=False)
    patched.save_patch(tmp_path / "second.safetensors")
    with pytest.raises(PatchError, match="was made for the model"):
        make(patch=str(tmp_path / "second.safetensors"))


def test_two_editors_at_once(make):
    """In turn, each as if it were alone."""
    one, two = make("gptj"), make("gpt2")
    for editor, _ in (one, two, one, two):
        editor.edit(FACTS[editor.edits_written : editor.edits_written + 1], evaluate=False)
    for family, (_, model) in (("gptj", one), ("gpt2", two)):
        alone, twin = make(family, edit_batch=1)
        alone.edit(FACTS[:2], evaluate=False)
        assert same(bits(model), bits(twin))


def test_facts_in_every_form(make, tmp_path):
    write_json(tmp_path / "facts.json", FACTS[:2])
    path = tmp_path / "facts.json"
    write_json(tmp_path / "one.json", FACTS[:1])
    write_json(tmp_path / "two.json", FACTS[1:2])
    both = tmp_path / "one.json", tmp_path / "two.json"
    forms = [
        FACTS[:2], tuple(FACTS[:2]), read_edits(str(path)), path, [str(path)], [path], list(both), both,
        (str(both[0]), both[1]), (fact for fact in FACTS[:2]),
    ]  # fmt: skip
    editor, model = make()
    found = []
    for form in forms:
        editor.edit(form, evaluate=False)
        found.append(bits(model))
        editor.revert()
    assert all(same(one, other) for one, other in pairwise(found))
    editor.edit(FACTS[0], evaluate=False)
    assert editor.edits_written == 1


def test_the_target_of_zsre_records_is_a_setting(make, tmp_path):
    record = {"src": "What does Ann speak?", "subject": "Ann", "answers": ["English"], "alt": "Basque"}
    write_json(tmp_path / "facts.json", [record])
    for settings, target in (({}, "English"), ({"data": {"zsre_target": "alt"}}, "Basque")):
        editor, _ = make(**settings)
        for form in ([record], tmp_path / "facts.json"):
            report = editor.edit(form, evaluate=False)
            assert [edit["target"] for edit in report.edits] == [target]
            editor.revert()


def test_questions_in_every_form(make):
    editor, _ = make()
    question = FACTS[0]["prompt"].replace("{}", FACTS[0]["subject"])
    assert editor.ask(question) == editor.ask([question]) == editor.ask((question,))
    assert editor.ask([]) == []
    with pytest.raises(ValueError, match=r"prompts\[1\] is '', which has no token; expected a text"):
        editor.ask([question, ""])


BAD_FACTS = {
    "a field": ([*FACTS[:3], {"prompt": "{} is", "subject": "A"}], r"facts\[3\]: no field 'target_new'"),
    "a template": ([FACTS[0], {**FACTS[1], "prompt": "{} and {}"}], r"facts\[1\]: .* has 2 '\{\}'"),
    "a target": ([{**FACTS[0], "target_new": " "}], r"facts\[0\]: the field 'target_new'"),
    "a kind": ([FACTS[0], 3], r"facts\[1\]: expected an object with named fields, got int"),
    "a contradiction": (
        [FACTS[0], {**FACTS[0], "target_new": "Basque"}], r"facts\[1\] contradicts facts\[0\]: .*'English' and 'Basque'"
    ),
    "a path among facts": ([FACTS[0], "facts.json"], r"facts\[1\]: expected an object with named fields, got str"),
    "none": ([], "nothing to edit"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FACTS)
def test_errors_name_the_fact(make, case):
    facts, message = BAD_FACTS[case]
    editor, model = make()
    before = bits(model)
    for call in (editor.edit, editor.evaluate):
        with pytest.raises(RecordError, match=message):
            call(facts)
    assert same(before, bits(model))


BAD_SETTINGS = {
    "unknown": ({"clampp": 1}, "clampp"),
    "value": ({"clamp": -1}, "clamp is -1, expected a number above 0"),
    "section": ({"spread": {"rule": "cubic"}}, "'rule'.* is cubic, expected sqrt or even"),
    "layers": ({"layers": [9]}, "expected different layers from 0 to 3"),
    "loading": ({"dtype": "bfloat16"}, "dtype says how to load a model, but this one is loaded already"),
    "stream": ({"data": {"stream": True}, "edit_batch": 2}, "a stream is for the command fit"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings(make, case):
    settings, message = BAD_SETTINGS[case]
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_bad_models(base):
    headless = AutoModel.from_pretrained(base / "gptj")
    tokenizer = AutoTokenizer.from_pretrained(base / "gptj")
    with pytest.raises(TypeError, match="GPTJModel, expected a causal language model"):
        Editor(headless, tokenizer)
    with pytest.raises(FileNotFoundError, match="no tokenizer for the model 'GPTJForCausalLM'"):
        Editor(AutoModelForCausalLM.from_config(CONFIGS["gptj"](vocab_size=8)))
    model = AutoModelForCausalLM.from_pretrained(base / "gptj")
    quantised = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    model.transformer.h[1].mlp.fc_out.weight = quantised
    with pytest.raises(
        ValueError, match=r"quantised \(transformer\.h\.1\.mlp\.fc_out\.weight is Tensor, torch\.int8\)"
    ):
        Editor(model, tokenizer)
    with pytest.raises(FileNotFoundError, match="cannot load 'nowhere/at-all'"):
        Editor("nowhere/at-all")


def test_a_model_that_something_else_has_changed(make):
    editor, model = make()
    editor.edit(FACTS[:1], evaluate=False)
    changed = copy.deepcopy(bits(model))
    with torch.no_grad():
        model.transformer.h[2].mlp.fc_out.weight.mul_(1.5)
    for call in (lambda: editor.edit(FACTS[1:]), editor.undo, editor.revert):
        with pytest.raises(RuntimeError, match=r"transformer\.h\.2\.mlp\.fc_out\.weight is not what this editor left"):
            call()
    model.load_state_dict(changed)
    editor.revert()


class HandsOn(GPTJForCausalLM):
    """A forward that hands everything on, as people write it."""

    def forward(self, *given, **named):
        return super().forward(*given, **named)


@pytest.mark.parametrize("how", ["compiled", "own forward", "output_attentions", "output_hidden_states"])
def test_what_is_around_a_model_changes_nothing(base, make, how):
    kind = HandsOn if how == "own forward" else GPTJForCausalLM
    flags = {how: True} if how.startswith("output") else {}
    expected, model = (k.from_pretrained(base / "gptj", attn_implementation="eager", **f)
                       for k, f in ((GPTJForCausalLM, {}), (kind, flags)))  # fmt: skip
    make(model=expected)[0].edit(FACTS, evaluate=False)
    editor, _ = make(model=torch.compile(model, backend="eager") if how == "compiled" else model)
    editor.edit(FACTS, evaluate=False)
    assert same(bits(model), bits(expected))
    assert not flags or getattr(model.config, how) is True, "the configuration is the caller's"


def test_an_adapter_is_refused(base):
    """Without the library: by where its modules come from."""
    model = AutoModelForCausalLM.from_pretrained(base / "gptj")
    model.add_module("adapter", type("LoraLayer", (torch.nn.Linear,), {"__module__": "peft.tuners.lora.layer"})(2, 2))
    with pytest.raises(ValueError, match=r"PEFT adapter \(LoraLayer\).*merge_and_unload"):
        Editor(model, AutoTokenizer.from_pretrained(base / "gptj"))


def test_the_typed_settings_are_those_of_the_classes():
    """A setting that is added to the module is one of the editor's."""
    taken = {name for kind in (TargetOptimizer, EditableModel) for name in inspect.signature(kind.__init__).parameters}
    own = set(inspect.signature(Editor.__init__).parameters) - {"self", "model", "tokenizer", "settings"}
    assert set(ModelSettings.__annotations__) == taken - {"self", "model_name", "layers", "kwargs"}
    assert set(EditorSettings.__annotations__) - set(ModelSettings.__annotations__) <= own
    assert own <= set(EditorSettings.__annotations__) | set(ModelSettings.__annotations__)


@pytest.mark.slow
def test_a_misspelled_setting_is_an_error_of_the_type_checker(tmp_path):
    (tmp_path / "use.py").write_text(
        "from pmet_lightning import Editor\n"
        'Editor("atlas", clamp=3, steps=20, lam=50, data={"limit": 3})\n'
        'Editor("atlas", clmp=3)\n'
        'Editor.from_config("pmet.yaml", clamp="three")\n'
    )
    command = [sys.executable, "-m", "mypy", "--config-file=", "--cache-dir", str(tmp_path / "cache"), "use.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    errors = [line for line in done.stdout.splitlines() if "use.py" in line and "error:" in line]
    assert [line.split(":")[1] for line in errors] == ["3", "4"], done.stdout
