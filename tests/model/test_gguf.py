"""GGUF files as models: a tiny Llama, written as one with its FFN weights quantized to eight bits."""

import importlib.util
import json
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pmet_lightning import Editor
from pmet_lightning.cli.dispatch import main
from pmet_lightning.data.encoder import load_tokenizer
from pmet_lightning.model.loading import load_config, load_model
from pmet_lightning.utils import gguf_cache
from pmet_lightning.utils.errors import PmetError
from tests.harness import as_arguments, tiny_settings
from tests.tiny import RECORDS, save_tiny

_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down",
    "mlp.up_proj": "ffn_up",
}
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_gguf(folder: str, path: Path, architecture: str = "llama") -> Path:
    """Write a Llama of a folder as a GGUF file: norms and attention in float32, the FFN in blocks of eight bits."""
    model, config = AutoModelForCausalLM.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, folder)
    for name, weight in model.state_dict().items():
        place = name.removesuffix(".weight")
        if place in _OUTER:
            writer.add_tensor(f"{_OUTER[place]}.weight", weight.numpy())
            continue
        _, _, layer, part = place.split(".", 3)
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(_PARTS[part])
        array = weight.numpy() if heads is None else _interleave(weight.numpy(), heads)
        kind = gguf.GGMLQuantizationType.Q8_0 if _PARTS[part].startswith("ffn_") and array.ndim == 2 else None
        stored = array if kind is None else gguf.quants.quantize(array, kind)
        writer.add_tensor(f"blk.{layer}.{_PARTS[part]}.weight", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rotary halves of each head as the pairs in which GGUF stores them."""
    rows = weight.shape[0] // heads
    return np.ascontiguousarray(weight.reshape(heads, 2, rows // 2, -1).swapaxes(1, 2).reshape(weight.shape))


def _add_tokenizer(writer: gguf.GGUFWriter, folder: str) -> None:
    described = json.loads((Path(folder) / "tokenizer.json").read_text())["model"]
    tokens = sorted(described["vocab"], key=described["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(tokens) - 1))
    writer.add_token_merges([" ".join(merge) for merge in described["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Nothing is kept in the user's own cache."""
    monkeypatch.setattr(gguf_cache, "FOLDER", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def file(folder, tmp_path_factory) -> Path:
    return write_gguf(folder, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_weights_are_unpacked(file, folder):
    found, original = load_model(str(file)), load_model(folder)
    assert set(found.state_dict()) == set(original.state_dict())
    for name, weight in original.state_dict().items():
        step = weight.abs().max() / 127 if ".mlp." in name else 0.0
        assert (found.state_dict()[name] - weight).abs().max() <= step
        assert found.state_dict()[name].dtype == torch.float32
    assert any(not torch.equal(found.state_dict()[name], weight) for name, weight in original.state_dict().items())


@pytest.mark.slow
def test_fit_and_export(file, tmp_path):
    """The exported folder opens without this package, and answers as the edited model did."""
    main(["fit", "--config", "pmet.yaml", *as_arguments(tiny_settings(tmp_path, str(file)))])
    main(["export", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "edited")])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "edited")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
    assert getattr(model.config, "quantization_config", None) is None
    card = (tmp_path / "edited" / "README.md").read_text()
    assert "tiny.gguf" in card
    assert "dequantized" in card
    assert str(tmp_path) not in card
    clean, patch = load_model(str(file)), (tmp_path / "run" / "patch.safetensors")
    editor = Editor(str(file), layers=[0, 1, 2], patch=str(patch))
    ids = torch.tensor([tokenizer("The mother tongue of Danila Morvane is")["input_ids"]])
    assert torch.equal(model(ids).logits, editor.model(ids).logits)
    assert not torch.equal(model(ids).logits, clean(ids).logits)


@pytest.mark.parametrize("given", ["name", "object"])
def test_editor(file, given, tmp_path):
    """A model that the user has loaded from a GGUF file is saved as one that was loaded by its name."""
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = str(file) if given == "name" else AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    editor = Editor(
        model, tokenizer, layers=[1], moments={"folder": str(tmp_path), "samples": 20}, corpus="atlas-corpus"
    )
    editor.edit(RECORDS[:1], evaluate=False)
    editor.save(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(saved.state_dict()[name], weight) for name, weight in editor.model.state_dict().items())


def test_configuration_and_tokenizer_are_parsed_once(file, cache, tmp_path):
    """What is kept equals what is parsed; a file that has changed is parsed again."""
    first, second = (load_config(str(file)) for _ in range(2))
    assert first.to_dict() | {"_name_or_path": ""} == second.to_dict() | {"_name_or_path": ""}
    text = "The mother tongue of Danila Morvane is 1.10, naïve and 北京"
    ids = [load_tokenizer(str(file))(text).input_ids for _ in range(2)]
    plain = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert ids == [plain(text).input_ids] * 2
    assert len(list(cache.iterdir())) == 1
    other = tmp_path / "copy.gguf"
    other.write_bytes(file.read_bytes())
    load_config(str(other))
    assert len(list(cache.iterdir())) == 2
    os.utime(other, (1, 1))
    load_config(str(other))
    assert len(list(cache.iterdir())) == 3


def test_a_cache_that_cannot_be_written_is_no_fault(file, cache):
    cache.write_text("a file where the folder would be")
    assert load_config(str(file)).num_hidden_layers == 4


def test_the_package_is_missing(file, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "pmet_lightning.utils.pretrained.find_spec", lambda name: None if name == "gguf" else find(name)
    )
    with pytest.raises(ImportError, match=r"tiny\.gguf.* needs gguf: pip install .*\[gguf\]"):
        load_model(str(file))


def test_the_architecture_is_unknown(folder, tmp_path):
    path = write_gguf(folder, tmp_path / "other.gguf", "a-family-of-tomorrow")
    with pytest.raises(PmetError, match=r"other\.gguf.*a-family-of-tomorrow.*expected a GGUF file of a model family"):
        load_model(str(path))


def test_no_gguf_file(tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"not a model at all")
    with pytest.raises(PmetError, match=r"broken\.gguf"):
        load_model(str(broken))
    with pytest.raises(FileNotFoundError, match=r"missing\.gguf"):
        load_model(str(tmp_path / "missing.gguf"))
