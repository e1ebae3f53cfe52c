"""Settings files of other programs: each key finds its place, or is named with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pmet_lightning.cli import foreign_keys
from pmet_lightning.cli.convert import convert_settings, read_settings
from pmet_lightning.cli.dispatch import main
from pmet_lightning.run.lightning_cli import build_fit
from pmet_lightning.run.options import UsageError, options_of
from tests.conftest import ROOT
from tests.harness import tiny_fit
from tests.tiny import save_tiny

MODULES = {
    "rewrite_module_tmp": "blocks.{}.ffn.out", "layer_module_tmp": "blocks.{}", "mlp_module_tmp": "blocks.{}.ffn",
    "attn_module_tmp": "blocks.{}.attn", "ln_f_module": "norm", "lm_head_module": "head",
}  # fmt: skip
SHARED = {
    **MODULES, "layers": [1, 2], "fact_token": "subject_last", "v_num_grad_steps": 12, "v_lr": "5e-1",
    "v_loss_layer": 3, "v_weight_decay": "1e-3", "clamp_norm_factor": 4, "kl_factor": 0.0625, "mom2_adjustment": True,
    "mom2_dataset": "wikipedia", "mom2_n_samples": 1000, "mom2_dtype": "float32",
}  # fmt: skip
MEMIT = {**SHARED, "layer_selection": "all", "mom2_update_weight": 300}
PMET = {**MEMIT, "nll_loss_factor": 1.0, "rewrite_module_tmps": ["blocks.{}.ffn.out"]}
ALPHA = {**MEMIT, "nullspace_threshold": "2e-2", "L2": 10, "P_loc": "./p.pt"}
ROME = {**SHARED, "mom2_adjustment": False, "context_template_length_params": [[5, 10], [10, 10]]}
TOOLBOX = {"model_name": "./cache/some-model", "stats_dir": "./stats", "device": 0, "model_parallel": False}


def as_toolbox(name: str, keys: dict[str, Any]) -> str:
    """A YAML file in EasyEdit's form: with the method and the model, and numbers such as 5e-1."""
    lines = [f"{key}: {value if key.startswith('v_') else json.dumps(value)}" for key, value in keys.items()]
    return "\n".join([f'alg_name: "{name}"', *(f"{key}: {json.dumps(v)}" for key, v in TOOLBOX.items()), *lines])


def as_program(keys: dict[str, Any]) -> str:
    """A JSON file in the form of the methods' own programs."""
    return json.dumps(
        {key: float(value) if key.startswith("v_") else value for key, value in keys.items()}, indent="\t"
    )


FILES = {
    "pmet.json": ("PMET", as_program(PMET)),
    "memit.json": ("MEMIT", as_program(MEMIT)),
    "alphaedit.json": ("AlphaEdit", as_program(ALPHA)),
    "rome.json": ("ROME", as_program(ROME)),
    "pmet.yaml": ("PMET", as_toolbox("PMET", PMET)),
    "memit.yaml": ("MEMIT", as_toolbox("MEMIT", MEMIT)),
    "alphaedit.yaml": ("AlphaEdit", as_toolbox("AlphaEdit", ALPHA)),
    "rome.yaml": ("ROME", as_toolbox("ROME", ROME)),
}


def converted(folder: Path, name: str, text: str, *options: str) -> Path:
    """The configuration that the command makes of a file."""
    (folder / name).write_text(text)
    main(["convert", "--settings", str(folder / name), "--out", str(folder / "mine.yaml"), *options])
    return folder / "mine.yaml"


@pytest.mark.parametrize("name", FILES)
def test_what_is_written_is_a_configuration_with_the_same_values(name, tmp_path):
    method, text = FILES[name]
    mine = converted(tmp_path, name, text)
    given = {"data.path": "facts.json"} | ({"model.model_name": "a-folder"} if name.endswith("json") else {})
    cli = build_fit(str(mine), given)
    assert cli.model.layers == [1, 2]
    assert cli.model.rules.clamp == 4
    assert cli.config["model"]["optimizer"]["init_args"]["lr"] == 0.5
    assert (cli.config["model"]["steps"], cli.config["model"]["norm_factor"]) == (12, 0.001)
    assert cli.config["moments"]["corpus"] == "wikimedia/wikipedia"
    assert cli.config["model"]["model_name"] == given.get("model.model_name", "./cache/some-model")
    assert cli.config["model"]["optimize"] == {"PMET": "attn+ffn", "ROME": "ffn"}.get(method, "hidden")
    assert cli.config["spread"]["rule"] == ("even" if method in ("MEMIT", "AlphaEdit") else "sqrt")
    assert cli.config["spread"]["lam"] == {"PMET": 300, "MEMIT": 300, "AlphaEdit": 6000, "ROME": 1}[method]
    assert bool(cli.config["spread"]["null_space"]) == (method == "AlphaEdit")


@pytest.mark.parametrize("name", FILES)
def test_every_key_is_accounted_for(name, tmp_path):
    method, text = FILES[name]
    keys = set(yaml.safe_load(text)) if name.endswith("yaml") else set(json.loads(text))
    lines = converted(tmp_path, name, text).read_text().splitlines()
    assert f"({method})" in lines[0]
    for key in keys - {"alg_name", "model_parallel"}:
        assert any(line.endswith(f"  # {key}") or line.startswith(f"#   {key} (") for line in lines), key


def test_a_converted_file_edits_a_model(tmp_path):
    mine = converted(tmp_path, "pmet.json", as_program(PMET))
    tiny = save_tiny("llama", tmp_path / "tiny")
    given = ("--model.context_count", "1", "--moments.samples", "20")
    ledger = tiny_fit(tmp_path, tiny, *given, config=str(mine))
    assert len(ledger) == 2
    assert torch.isfinite(torch.tensor([entry["p_after"] for entry in ledger])).all()


def test_differences_in_what_is_computed_are_told(tmp_path, caplog):
    keys = {**MEMIT, "fact_token": "last", "layer_selection": "random", "kl_facotr": 1}
    found = convert_settings(keys, "hparams.json")
    assert found.differing == ["fact_token", "layer_selection", "kl_facotr"]
    assert "did you mean kl_factor?" in found.dropped["kl_facotr"]
    converted(tmp_path, "hparams.json", as_program(keys))
    assert 'hparams.json: fact_token ("last"): edits are always made at the subject\'s last token' in caplog.text
    assert "v_loss_layer" not in caplog.text


def test_attention_two_devices_and_half_precision_have_settings():
    keys = {**PMET, "rewrite_module_tmps": ["h.{}.ffn.out", "h.{}.attn.out"], "fp16": True, "model_parallel": True}
    settings = convert_settings(keys, "x.json").settings
    assert settings["spread.write"] == ("attn+ffn", "rewrite_module_tmps")
    assert settings["model.dtype"] == ("float16", "fp16")
    assert settings["model.device_map"] == ("auto", "model_parallel")
    settings = convert_settings({**ROME, "mom2_dataset": "my/texts"}, "x.json").settings
    assert (settings["model.context_count"][0], settings["model.context_length"][0]) == (20, 10)
    assert (settings["moments.corpus"][0], settings["moments.corpus_subset"][0]) == ("my/texts", None)


PROBLEMS = {
    '{"layers": [1], "nll_loss_factor": 1, "clamp_norm_factor": "much"}':
        r"bad.json: clamp_norm_factor is much, expected a number above 0",
    '{"layers": "all", "nll_loss_factor": 1}': r"bad.json: layers is all, expected a list such as",
    '{"nll_loss_factor": 1, "v_lr": 0}': r"bad.json: v_lr is 0, expected a number above 0",
    '{"nll_loss_factor": 1, "v_num_grad_steps": 2.5}': r"bad.json: v_num_grad_steps is 2.5, expected a whole number",
    '{"layers": [5], "context_template_length_params": [5, 10]}':
        r"bad.json: context_template_length_params is \[5, 10\], expected pairs of a length and a number",
    '{"alg_name": "WISE"}': r"bad.json: alg_name is WISE, expected one of PMET, MEMIT, AlphaEdit, ROME",
    '{"layers": [5], "norm_constraint": 5e-5}':
        r"bad.json: it has neither alg_name nor .*found layers, norm_constraint.*--method",
    '{"layers": [5],\n "x" 3}': r"bad.json, line 2: not valid JSON",
    "[1, 2]": r"bad.json: expected settings by name, found list",
}  # fmt: skip


@pytest.mark.parametrize("text", PROBLEMS)
def test_bad_input_is_named(text, tmp_path):
    with pytest.raises(UsageError, match=PROBLEMS[text]):
        converted(tmp_path, "bad.json", text)
    assert not (tmp_path / "mine.yaml").exists()


def test_files_are_not_guessed_and_not_overwritten(tmp_path):
    with pytest.raises(FileNotFoundError, match="--settings .*none.yaml: no such file"):
        read_settings(str(tmp_path / "none.yaml"))
    (tmp_path / "odd.yaml").write_text("a: [\n")
    with pytest.raises(UsageError, match=r"odd.yaml, line 2: not valid YAML"):
        read_settings(str(tmp_path / "odd.yaml"))
    converted(tmp_path, "one.json", '{"layers": [5], "v_lr": 0.5}', "--method", "MEMIT")
    with pytest.raises(FileExistsError, match="--out"):
        converted(tmp_path, "one.json", '{"layers": [5]}', "--method", "MEMIT")


def test_a_file_of_theirs_as_a_configuration_is_recognized(tmp_path):
    for name in ("memit.json", "pmet.yaml"):
        (tmp_path / name).write_text(FILES[name][1].replace("\t", " "))
        with pytest.raises(UsageError, match=rf"{name}: settings of another program.*convert --settings .*{name}"):
            main(["fit", "--config", str(tmp_path / name)])


def test_the_tables_name_settings_that_exist():
    ours = options_of("fit")
    named = {*foreign_keys.RENAMED.values(), *(name for method in foreign_keys.METHODS.values() for name in method)}
    assert named <= set(ours)
    groups = [foreign_keys.RENAMED, foreign_keys.CHANGED, foreign_keys.FIXED, foreign_keys.WITHOUT]
    assert len(set().union(*groups)) == sum(map(len, groups)), "a key has one place"


def test_the_page_names_every_key():
    page = (ROOT / "docs" / "coming-from.md").read_text()
    keys = {*foreign_keys.RENAMED, *foreign_keys.CHANGED, *foreign_keys.FIXED, *foreign_keys.WITHOUT}
    assert {key for key in keys if f"`{key}`" not in page} == set()
    for key, setting in foreign_keys.RENAMED.items():
        assert f"| `{key}` | `{setting}` |" in page
