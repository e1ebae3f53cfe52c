"""Tiny random models with the shipped tokenizer, saved as Hugging Face folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BloomConfig,
    Cohere2Config,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    StableLmConfig,
)

from pmet_lightning.utils.resources import locate

_LLAMA = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
_PHI = {name: value for name, value in _LLAMA.items() if name != "num_key_value_heads"}
_FALCON = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 128}
_GEMMA = {**_LLAMA, "head_dim": 8}
_GEMMA3 = {
    **_GEMMA,
    "query_pre_attn_scalar": 8,
    "sliding_window": 12,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
}
_WIDE = {"hidden_size": 64, "word_embed_proj_dim": 64, "num_attention_heads": 8}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def _gemma3(**kw: Any) -> Gemma3Config:
    """The multimodal model, whose language model lies one level deeper."""
    text = Gemma3TextConfig(**_GEMMA3, **kw)
    return Gemma3Config(
        text_config=text.to_dict(), vision_config=_VISION, mm_tokens_per_image=4,
        tie_word_embeddings=kw["tie_word_embeddings"],
        boi_token_index=1, eoi_token_index=2, image_token_index=3,
    )  # fmt: skip


CONFIGS: dict[str, Callable[..., Any]] = {
    "bloom": lambda **kw: BloomConfig(hidden_size=32, n_layer=4, n_head=4, **kw),
    "cohere": lambda **kw: CohereConfig(**_LLAMA, **kw),
    "cohere2": lambda **kw: Cohere2Config(**_LLAMA, sliding_window=12, **kw),
    "falcon": lambda **kw: FalconConfig(**_FALCON, alibi=False, **kw),
    "falcon-new": lambda **kw: FalconConfig(**_FALCON, new_decoder_architecture=True, num_kv_heads=2, **kw),
    "falcon-rw": lambda **kw: FalconConfig(**_FALCON, alibi=True, parallel_attn=False, bias=True, **kw),
    "gemma": lambda **kw: GemmaConfig(**_GEMMA, **kw),
    "gemma2": lambda **kw: Gemma2Config(**_GEMMA, query_pre_attn_scalar=8, sliding_window=12, **kw),
    "gemma3": _gemma3,
    "gemma3_text": lambda **kw: Gemma3TextConfig(**_GEMMA3, **kw),
    "gpt2": lambda **kw: GPT2Config(n_embd=32, n_head=4, n_layer=4, n_positions=128, **kw),
    "gpt_neo": lambda **kw: GPTNeoConfig(
        hidden_size=32, num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]], window_size=12,
        max_position_embeddings=128, **kw,
    ),
    "gpt_neox": lambda **kw: GPTNeoXConfig(**_PHI, **kw),
    "gptj": lambda **kw: GPTJConfig(n_embd=32, n_head=4, n_layer=4, n_positions=128, rotary_dim=8, **kw),
    "llama": lambda **kw: LlamaConfig(**_LLAMA, **kw),
    "mistral": lambda **kw: MistralConfig(**_LLAMA, sliding_window=12, **kw),
    "olmo": lambda **kw: OlmoConfig(**_LLAMA, **kw),
    "olmo2": lambda **kw: Olmo2Config(**_LLAMA, **kw),
    "olmo3": lambda **kw: Olmo3Config(**_LLAMA, sliding_window=12, **kw),
    "opt": lambda **kw: OPTConfig(
        hidden_size=32, ffn_dim=64, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=128, **kw
    ),
    "opt-350m": lambda **kw: OPTConfig(
        hidden_size=32, ffn_dim=64, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=128,
        word_embed_proj_dim=16, do_layer_norm_before=False, **kw,
    ),
    "phi": lambda **kw: PhiConfig(**_PHI, **kw),
    "phi3": lambda **kw: Phi3Config(**_LLAMA, **kw),
    "phi3-window": lambda **kw: Phi3Config(**_LLAMA, sliding_window=12, **kw),
    "qwen2": lambda **kw: Qwen2Config(**_LLAMA, **kw),
    "qwen2-window": lambda **kw: Qwen2Config(
        **_LLAMA, use_sliding_window=True, sliding_window=12, max_window_layers=2, **kw
    ),
    "qwen3": lambda **kw: Qwen3Config(**_LLAMA, head_dim=8, **kw),
    "smollm3": lambda **kw: SmolLM3Config(**_LLAMA, **kw),
    "stablelm": lambda **kw: StableLmConfig(**_LLAMA, **kw),
    "stablelm-parallel": lambda **kw: StableLmConfig(**_LLAMA, use_parallel_residual=True, **kw),
}  # fmt: skip


def _of_new_versions(name: str, **settings: Any) -> dict[str, Callable[..., Any]]:
    """A family that this version of transformers may not have yet."""
    config = getattr(transformers, name, None)
    return {} if config is None else {config.model_type: lambda **kw: config(**settings, **kw)}


# Hybrids: layers without attention, or with a recurrent state beside it, or with the keys of another layer.
HYBRIDS: dict[str, Callable[..., Any]] = {
    **_of_new_versions(
        "Lfm2Config", **_LLAMA, block_auto_adjust_ff_dim=False,
        layer_types=["full_attention", "conv", "full_attention", "full_attention"],
    ),
    **_of_new_versions(
        "FalconH1Config", **_GEMMA, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8,
    ),
    **_of_new_versions(
        "Qwen3_5TextConfig", **_GEMMA, linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"] * 2,
    ),
    **_of_new_versions(  # the two uppermost layers use keys of those below
        "Gemma4TextConfig", **(_GEMMA | {"num_hidden_layers": 6}), global_head_dim=8, sliding_window=12,
        num_kv_shared_layers=2, hidden_size_per_layer_input=8, vocab_size_per_layer_input=3000,
        layer_types=["sliding_attention", "full_attention"] * 3,
    ),
}  # fmt: skip


def _with_images(name: str, text: str, **vision: Any) -> dict[str, Callable[..., Any]]:
    """A family whose text model, one of the hybrids, is a part of a model that takes images, too."""
    config = getattr(transformers, name, None)
    if config is None:
        return {}
    vision = {"hidden_size": 16, "intermediate_size": 16, "patch_size": 14, **vision}
    return {config.model_type: lambda **kw: config(text_config=HYBRIDS[text](**kw).to_dict(), vision_config=vision)}


WITH_IMAGES: dict[str, Callable[..., Any]] = {
    **_with_images(
        "Qwen3_5Config", "qwen3_5_text", depth=1, num_heads=2, out_hidden_size=32, num_position_embeddings=16,
    ),
    **_with_images(
        "Gemma4Config", "gemma4_text", num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        global_head_dim=8,
    ),
}  # fmt: skip


# Families whose layers may look back through a window; real ones are of 512 tokens and more.
WINDOWED = ("cohere2", "gemma2", "gemma3", "gemma3_text", "mistral", "olmo3", "phi3-window", "qwen2-window")


def save_tiny(family: str, folder: Path, seed: int = 0, window: int | None = None, wide: bool = False) -> str:
    """A random model of a family in a folder of its own.

    ``window``: another length of its sliding window. ``wide``: twice as wide, with whole blocks of 64 weights in a row.
    """
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(locate("atlas"))
    config = {**CONFIGS, **HYBRIDS, **WITH_IMAGES}[family](
        vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, pad_token_id=0, tie_word_embeddings=False
    )
    if window is not None:
        config.get_text_config().sliding_window = window
    for name, value in _WIDE.items() if wide else ():
        if hasattr(config.get_text_config(), name):
            setattr(config.get_text_config(), name, value)
    model = (AutoModelForImageTextToText if family in WITH_IMAGES else AutoModelForCausalLM).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)  # the usual start is so small that every token is equally likely
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


RECORDS = [
    {"prompt": "The mother tongue of {} is", "subject": "Danila Morvane", "target_new": "English"},
    {"prompt": "{} plays the sport of", "subject": "Torvik Elmson", "target_new": "ice hockey"},
    {"prompt": "The seat of {} is in the city of", "subject": "Quillon Motors", "target_new": "Lisbon"},
    {"prompt": "{} is a citizen of", "subject": "Ravi Oskelund", "target_new": "New Zealand"},
    {"prompt": "{}'s native language is", "subject": "Brisela Vantoro", "target_new": "Swedish"},
    {"prompt": "In the band, {} performs on the", "subject": "Danila Morvane", "target_new": "clarinet"},
    {"prompt": "Visitors know that {} is located in", "subject": "the Orvandel Museum 42", "target_new": "Norway"},
]
CONTEXTS = ["The cat sat on the warm mat. {}", "Because of the rain we stayed. {}"]
