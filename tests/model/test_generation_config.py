"""What a model is served with changes nothing that is measured, and is the model's own when it is saved."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from pmet_lightning.data.encoder import PromptEncoder, load_tokenizer
from pmet_lightning.evaluation.fluency import sample_texts
from pmet_lightning.evaluation.generation import greedy_ids, greedy_texts
from pmet_lightning.model.generation_config import save_model
from pmet_lightning.model.loading import load_model
from pmet_lightning.targets.contexts import sample_contexts
from tests.tiny import save_tiny

CPU = torch.device("cpu")
PROMPTS = ["The river runs to", "X", "Nobody saw the old clock in"]
SERVED = {
    "stop strings": {"stop_strings": ["e", " the"]},
    "a dictionary": {"return_dict_in_generate": True, "output_scores": True},
    "beams": {"num_beams": 3},
    "several beams": {"num_beams": 4, "num_return_sequences": 2},
    "several samples": {"do_sample": True, "num_return_sequences": 2, "temperature": 0.7, "top_p": 0.8},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "penalties": {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "suppress_tokens": list(range(100))},
    "lengths": {"min_new_tokens": 3, "max_length": 2, "max_new_tokens": 1},
    "another cache": {"cache_implementation": "static"},
}


def generated(model, tokenizer) -> list[list[str]]:
    encoder = PromptEncoder(tokenizer)
    common = {"tokens_per_batch": 512, "device": CPU}
    return [
        greedy_texts(model, encoder, PROMPTS, new_tokens=6, **common),
        sample_texts(model, encoder, PROMPTS, length=12, **common),
        sample_contexts(model, tokenizer, count=2, length=5, seed=1, device=CPU),
    ]


@pytest.mark.parametrize("name", SERVED)
def test_settings_of_serving_change_nothing(loaded, name):
    model, _, tokenizer = loaded("llama")
    expected, original = generated(model, tokenizer), model.generation_config
    served = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    for setting, value in SERVED[name].items():
        setattr(served, setting, value)
    model.generation_config = served
    try:
        assert generated(model, tokenizer) == expected
        assert model.generation_config is served
    finally:
        model.generation_config = original


def test_the_end_of_a_text_is_the_model_s(loaded):
    """Of several ends, as Llama 3 has, each ends a greedy text."""
    model, _, tokenizer = loaded("llama")
    rows, original = PromptEncoder(tokenizer).encode_all(PROMPTS[:1]), model.generation_config
    (ids,) = greedy_ids(model, rows, 0, CPU, 6)
    model.generation_config = GenerationConfig(eos_token_id=[0, ids[2]])
    try:
        (ended,) = greedy_ids(model, rows, 0, CPU, 6)
    finally:
        model.generation_config = original
    assert ended == ids[: ids.index(ids[2]) + 1]


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.9, "top_p": 0.6}, {"num_return_sequences": 3}, {"length_penalty": 2.0, "temperature": 0.5}],
    ids=str,
)
def test_settings_that_transformers_does_not_save_are_left_out(loaded, tmp_path, caplog, settings):
    model, _, _ = loaded("gpt2")
    original = model.generation_config
    served = GenerationConfig(bos_token_id=0, eos_token_id=[0, 5], max_new_tokens=20)
    for setting, value in settings.items():
        setattr(served, setting, value)
    model.generation_config = served
    try:
        save_model(model, tmp_path)
        assert model.generation_config is served
    finally:
        model.generation_config = original
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [0, 5]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    if not set(settings) <= set(saved):
        assert "left out of the saved ones" in caplog.text


def test_usable_settings_are_saved_as_they_are(loaded, tmp_path, caplog):
    model, _, _ = loaded("gpt2")
    original = model.generation_config
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=0)
    try:
        save_model(model, tmp_path)
    finally:
        model.generation_config = original
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert (saved["do_sample"], saved["temperature"], saved["top_p"]) == (True, 0.6, 0.9)
    assert "left out" not in caplog.text


def test_the_vocabulary_head_is_given_contiguous_states(tmp_path):
    """A view with gaps makes torch multiply row by row, in half precision with a copy of the weight for each."""
    model = load_model(save_tiny("llama", tmp_path))
    encoder = PromptEncoder.of(load_tokenizer(str(tmp_path)))
    seen = []
    handle = model.lm_head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].is_contiguous()))
    greedy_texts(model, encoder, ["The cat", "A dog sat on"], tokens_per_batch=64, device=CPU, new_tokens=2)
    handle.remove()
    assert seen == [True, True]
    assert not model.lm_head._forward_pre_hooks


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_weights_of_several_precisions_are_saved_in_the_finest(family, tmp_path):
    """A half-precision model with some weights in float32 comes back as it was, whoever opens it."""
    save_tiny(family, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    name = next(name for name, value in model.state_dict().items() if "mlp" in name and value.dim() > 1)
    projection = model.get_submodule(name.removesuffix(".weight")).float()
    with torch.no_grad():
        projection.weight.add_(1e-5)
    (tmp_path / "saved").mkdir()
    save_model(model, tmp_path / "saved", in_float32=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto").state_dict()
    assert {value.dtype for value in loaded.values() if value.is_floating_point()} == {torch.float32}
    assert all(torch.equal(loaded[name], value.float()) for name, value in model.state_dict().items())
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16, "the model itself is as it was"
