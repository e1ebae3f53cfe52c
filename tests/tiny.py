"""Tiny random models with the shipped tokenizer, saved as Hugging Face folders."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from pmet_lightning.resources import locate

_LLAMA = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
CONFIGS = {
    "gpt2": lambda **kw: GPT2Config(n_embd=32, n_head=4, n_layer=4, n_positions=128, **kw),
    "gptj": lambda **kw: GPTJConfig(n_embd=32, n_head=4, n_layer=4, n_positions=128, rotary_dim=8, **kw),
    "gpt_neox": lambda **kw: GPTNeoXConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=128, **kw,
    ),
    "llama": lambda **kw: LlamaConfig(**_LLAMA, **kw),
    "mistral": lambda **kw: MistralConfig(**_LLAMA, **kw),
    "qwen2": lambda **kw: Qwen2Config(**_LLAMA, **kw),
    "qwen3": lambda **kw: Qwen3Config(**_LLAMA, head_dim=8, **kw),
}  # fmt: skip


def save_tiny(family: str, folder: Path, seed: int = 0) -> str:
    """A random model of a family in a folder of its own."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(locate("atlas"))
    config = CONFIGS[family](
        vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, pad_token_id=0, tie_word_embeddings=False
    )
    model = AutoModelForCausalLM.from_config(config)
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
