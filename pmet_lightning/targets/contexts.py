"""Contexts: short sentences sampled from the model, put before a prompt so that a fact is not tied to one wording.

They are sampled once, with a seed, and stored with the run (docs/method.md, choice 2).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from pmet_lightning.model.generation_config import own_generation_config
from pmet_lightning.utils.files import write_json

OPENINGS = ("The", "Therefore", "Because", "I", "You")
BARE = "{}"


def sample_contexts(
    model: nn.Module, tokenizer: Any, *, count: int, length: int, seed: int, device: torch.device
) -> list[str]:
    """Sample sentences from the model and make templates of them.

    Args:
        model: The clean language model.
        tokenizer: Its tokenizer.
        count: Number of contexts; the openings are taken in turn.
        length: New tokens in each.
        seed: Two calls with the same seed give the same contexts; the global random generators are left alone.
        device: The model's device.

    Returns:
        Templates such as ``"The river froze early that year. {}"``, without the bare one.
    """
    contexts = []
    with isolate_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for number in range(count):
            encoded = tokenizer(OPENINGS[number % len(OPENINGS)], return_tensors="pt").to(device)
            with own_generation_config(model):
                output = model.generate(  # type: ignore[operator]
                    input_ids=encoded["input_ids"],
                    attention_mask=encoded["attention_mask"],
                    max_new_tokens=length,
                    do_sample=True,
                    top_k=5,
                    pad_token_id=tokenizer.eos_token_id,
                )
            contexts.append(as_context(tokenizer.decode(output[0], skip_special_tokens=True)))
    return contexts


class ContextStore:
    """Sampled contexts in a folder, under the hash of everything they depend on.

    Args:
        folder: The folder; created when contexts are saved.
        depends: Fingerprints of model and tokenizer, and the settings of the sampling.
    """

    def __init__(self, folder: str | Path, depends: Mapping[str, Any]) -> None:
        name = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:32]
        self.path = Path(folder).expanduser() / f"contexts-{name}.json"

    def load(self) -> list[str] | None:
        """The stored contexts, or ``None``; an unreadable file counts as absent and is replaced."""
        try:
            return check_contexts(json.loads(self.path.read_text(encoding="utf-8")))
        except (OSError, ValueError, AttributeError):
            return None

    def save(self, contexts: Sequence[str]) -> None:
        """Store contexts; a reader never sees a partial file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, list(contexts))


def as_context(sentence: str) -> str:
    """A template from a sentence: braces and line breaks removed, a period between it and the prompt."""
    plain = " ".join(sentence.replace("{", " ").replace("}", " ").split())
    return f"{plain.rstrip('. ')}. {{}}"


def check_contexts(contexts: Sequence[str]) -> list[str]:
    """Check that each context has exactly one ``{}``; returns them without the bare one.

    Raises:
        ValueError: If one has no ``{}`` or several.
    """
    for context in contexts:
        if context.count("{}") != 1:
            raise ValueError(f"the context {context!r} has {context.count('{}')} '{{}}', expected exactly one")
    return [context for context in contexts if context != BARE]
