"""Models made by hand whose facts lie at a known place: one FFN stores them, one attention fetches them.

The FFN of one layer answers to the last token of each subject with a direction of the answer's own; the attention of a
higher layer looks at all tokens alike and copies these directions; every other attention and FFN gives zeros.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from pmet_lightning.analysis.study import Scope, Study
from pmet_lightning.data.encoder import PromptEncoder, load_tokenizer
from pmet_lightning.model.architectures import architecture_of
from pmet_lightning.model.loading import load_config, load_model
from pmet_lightning.model.projections import Sites
from pmet_lightning.utils.resources import locate
from tests.tiny import CONFIGS

WIDTH, MEANING = 32, 24  # the dimensions after MEANING hold the answers' directions
SCOPE = Scope(top=50, least=0.1, noise=3.0, draws=4, seed=0, window=1, tokens_per_batch=2048)
FACTS = [
    {"prompt": "The mother tongue of {} is", "subject": "Danila Morvane", "ground_truth": "Basque"},
    {"prompt": "{} plays the sport of", "subject": "Torvik Elmson", "ground_truth": "golf"},
    {"prompt": "The birthplace of {} is", "subject": "Ravi Oskelund", "ground_truth": "Lima"},
]
TARGETS = ["golf", "Lima", "Basque"]  # what an edit makes of them


def answer_direction(i: int) -> torch.Tensor:
    direction = torch.zeros(WIDTH)
    direction[MEANING + 2 * i], direction[MEANING + 2 * i + 1] = 1.0, -1.0
    return direction


def records(edited: bool = True) -> list[dict[str, str]]:
    """The facts as flat records."""
    return [{**fact, "target_new": target if edited else fact["ground_truth"]}
            for fact, target in zip(FACTS, TARGETS, strict=True)]  # fmt: skip


def save_planted(family: str, folder: Path, store: int, fetch: int) -> str:
    """A GPT-2 (sequential blocks) or GPT-J (parallel blocks) with its facts in layer ``store``."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(locate("atlas"))
    config = CONFIGS[family](
        vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, pad_token_id=0, tie_word_embeddings=False
    )
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    body = model.transformer
    for layer in body.h:
        for name, parameter in layer.named_parameters():
            if "ln_" not in name:
                parameter.zero_()
    if family == "gpt2":
        body.wpe.weight.zero_()
    meaning = torch.randn(len(tokenizer), MEANING)
    body.wte.weight.zero_()
    body.wte.weight[:, :MEANING] = meaning - meaning.mean(dim=1, keepdim=True)
    model.lm_head.weight.zero_()
    model.lm_head.weight[:, :MEANING] = 0.1 * torch.randn(len(tokenizer), MEANING)
    if model.lm_head.bias is not None:
        model.lm_head.bias.zero_()
    _plant_store(model, tokenizer, body.h[store].mlp)
    _plant_fetch(body.h[fetch].attn)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _set(projection: nn.Module, weight_OI: torch.Tensor) -> None:
    projection.weight.copy_(weight_OI if isinstance(projection, nn.Linear) else weight_OI.T)


def _plant_store(model: nn.Module, tokenizer, mlp: nn.Module) -> None:
    first, second = (mlp.c_fc, mlp.c_proj) if hasattr(mlp, "c_fc") else (mlp.fc_in, mlp.fc_out)
    keys, values = torch.zeros(4 * WIDTH, WIDTH), torch.zeros(WIDTH, 4 * WIDTH)
    for i, fact in enumerate(FACTS):
        last = tokenizer(f" {fact['subject']}")["input_ids"][-1]
        key = nn.functional.layer_norm(model.transformer.wte.weight[last], (WIDTH,))
        keys[i] = 40 * key / WIDTH  # 40 for the subject's last token, less than 28 for every other
        values[:, i] = 3 * answer_direction(i)
        answer = tokenizer(f" {fact['ground_truth']}")["input_ids"][0]
        model.lm_head.weight[answer] = 3 * answer_direction(i)
    _set(first, keys)
    first.bias[: len(FACTS)] = -28
    _set(second, values)


def _plant_fetch(attn: nn.Module) -> None:
    copied = torch.zeros(WIDTH, WIDTH)
    copied[MEANING:, MEANING:] = torch.eye(WIDTH - MEANING)
    if hasattr(attn, "c_attn"):
        weight = torch.zeros(3 * WIDTH, WIDTH)
        weight[2 * WIDTH :] = copied
        _set(attn.c_attn, weight)
        _set(attn.c_proj, 40 * copied)
    else:
        _set(attn.v_proj, copied)
        _set(attn.out_proj, 40 * copied)


def edit_of(fact: int) -> torch.Tensor:
    """ΔW of the storing FFN's output projection that makes one fact's answer its target's, shape [out, in]."""
    delta = torch.zeros(WIDTH, 4 * WIDTH)
    new = [f["ground_truth"] for f in FACTS].index(TARGETS[fact])
    delta[:, fact] = 3 * (answer_direction(new) - answer_direction(fact))
    return delta


def study_of(folder: str, dtype: str = "float32", **scope) -> Study:
    model = load_model(folder, dtype)
    sites = Sites.of(model, architecture_of(load_config(folder)))
    return Study(model, sites, PromptEncoder.of(load_tokenizer(folder)), Scope(**{**vars(SCOPE), **scope}))


def written(folder, rows) -> str:
    path = folder / "records.json"
    path.write_text(json.dumps(rows))
    return str(path)
