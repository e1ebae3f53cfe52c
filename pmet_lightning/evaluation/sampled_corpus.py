"""General text that needs no file: sampled from the model itself.

What a model writes without a prompt is distributed as the text that it was trained on, as far as it knows that text.
Its keys are those that an edit should leave alone, so it serves where no corpus is at hand.
Legend: R = rows, T = tokens, V = vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from pmet_lightning.data.corpus import SAMPLED, corpus_texts, prefix_of
from pmet_lightning.evaluation.editable import EditableModel
from pmet_lightning.model.generation_config import own_generation_config

_TEXTS, _LENGTH = 32, 128  # texts sampled together; new tokens of each, fewer if the model has fewer positions
_OPENING = "The"  # for tokenizers that put nothing before a text


def general_texts(module: EditableModel, name: str, subset: str | None = None, seed: int = 0) -> Iterator[str]:
    """Texts of a corpus, or of the model as it is now.

    Args:
        module: The language model.
        name: ``sampled-corpus``, or as for :func:`~pmet_lightning.data.corpus.corpus_texts`.
        subset: Subset of a hub data set.
        seed: Seed of the order, or of the sampling.

    Raises:
        FileNotFoundError: If there is no such corpus.
        CorpusError: If it has no column 'text'.
    """
    return sampled_texts(module, seed) if name == SAMPLED else corpus_texts(name, subset, seed)


def sampled_texts(module: EditableModel, seed: int) -> Iterator[str]:
    """Texts without end, sampled at temperature 1; two calls with one seed give the same ones on the same model.

    Args:
        module: The language model.
        seed: The seed; the global random generators are left alone.
    """
    from transformers import LogitsProcessorList

    tokenizer = module.tokenizer
    start = prefix_of(tokenizer) or tokenizer(_OPENING, add_special_tokens=False)["input_ids"]
    ids_RT = torch.tensor([start] * _TEXTS, device=module.device)
    positions = getattr(module.model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[operator, union-attr]
    length = _LENGTH if positions is None else min(_LENGTH, positions - len(start))
    for number in itertools.count():
        with isolate_rng(), torch.no_grad(), own_generation_config(module.model):
            torch.manual_seed(seed * 2**20 + number)
            output_RT = module.model.generate(  # type: ignore[operator]
                input_ids=ids_RT,
                attention_mask=torch.ones_like(ids_RT),
                max_new_tokens=length,
                do_sample=False,
                logits_processor=LogitsProcessorList([_only_the_drawn]),
                pad_token_id=module.encoder.pad_id,
            )
        texts = (module.encoder.decode(row).strip() for row in output_RT.tolist())
        yield from filter(None, texts)


def _only_the_drawn(_: Tensor, logits_RV: Tensor) -> Tensor:
    """Logits that leave ``generate`` no choice: its own sampling takes half of the time of a small model on a CPU."""
    return torch.full_like(logits_RV, -torch.inf).scatter_(1, draw(logits_RV), 0.0)


def draw(logits_RV: Tensor) -> Tensor:
    """A token for each row, drawn from the softmax of its logits by a single random number, shape [R, 1].

    ``torch.multinomial`` draws one for each token of the vocabulary.

    Args:
        logits_RV: The logits, of which some may be -inf.
    """
    below_RV = logits_RV.float().softmax(dim=-1).cumsum(dim=-1)
    sought_R1 = below_RV[:, -1:] * torch.rand(len(below_RV), 1, device=below_RV.device)
    return torch.searchsorted(below_RV, sought_R1, right=True).clamp_(max=below_RV.shape[1] - 1)
