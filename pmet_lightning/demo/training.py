"""The small language model that knows Atlas, trained with plain Lightning."""

from __future__ import annotations

import itertools
import json
import logging
import random
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from pmet_lightning.demo.recall import measure_recall
from pmet_lightning.demo.world import World, training_sentences

log = logging.getLogger(__name__)

_END = "<|endoftext|>"
_VOCABULARY = 3_000
_LAYERS, _WIDTH, _HEADS, _INNER, _POSITIONS = 8, 192, 6, 768, 128
# Tokens per text, epoch by epoch. With short texts, more sentences begin a text, as prompts do; the long texts
# train the positions that generated texts reach.
_LENGTHS = (64, 64, 64, 128)


def _gpt(kind: type[PretrainedConfig], **common: Any) -> PretrainedConfig:
    return kind(
        n_positions=_POSITIONS,
        n_embd=_WIDTH,
        n_layer=_LAYERS,
        n_head=_HEADS,
        n_inner=_INNER,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **common,
    )


def _llama(**common: Any) -> PretrainedConfig:
    return LlamaConfig(
        max_position_embeddings=_POSITIONS,
        hidden_size=_WIDTH,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        intermediate_size=_INNER,
        **common,
    )


# Epochs after which the model knows all facts.
EPOCHS = {"gptj": 10, "gpt2": 16, "llama": 16}
ARCHITECTURES: dict[str, Callable[..., PretrainedConfig]] = {
    "gptj": partial(_gpt, GPTJConfig, rotary_dim=_WIDTH // _HEADS),
    "gpt2": partial(_gpt, GPT2Config),
    "llama": _llama,
}


def train_tokenizer(sentences: Iterable[str]) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE vocabulary in which most names are one or two tokens.

    Args:
        sentences: The text to learn it from.

    Returns:
        A tokenizer that adds no special tokens and pads on the right with the end-of-text token.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY, special_tokens=[_END], initial_alphabet=alphabet, show_progress=False
    )
    # With a leading space, as inside a text: a word at the beginning of a text is the rarer case.
    bpe.train_from_iterator((f" {sentence}" for sentence in sentences), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=_END,
        pad_token=_END,
        padding_side="right",
        model_max_length=_POSITIONS,
        # Older releases would add token types, which GPT-J would embed as additional tokens.
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def pack(sentences: list[str], tokenizer: PreTrainedTokenizerFast, length: int) -> Iterator[list[int]]:
    """Pack sentences into texts of one length that all begin with a sentence.

    Args:
        sentences: Complete sentences, in this order.
        tokenizer: The tokenizer.
        length: Tokens per text.

    Yields:
        Token ids. A sentence cut off at the end of a text is the first one of the next text, so each is read
        whole at least once. The unrelated sentences before it teach the model to answer whatever precedes a
        prompt.
    """
    at_start = tokenizer(sentences)["input_ids"]
    inside = tokenizer([f" {sentence}" for sentence in sentences])["input_ids"]
    text: list[int] = []
    for first, later in zip(at_start, inside, strict=True):
        text += later if text else first
        if len(text) >= length:
            yield text[:length]
            text = list(first) if len(text) > length else []


def batches(
    world: World, tokenizer: PreTrainedTokenizerFast, epochs: int, batch_tokens: int, seed: int
) -> list[torch.Tensor]:
    """Prepare the batches of the whole training run.

    Args:
        world: The world.
        tokenizer: Its tokenizer.
        epochs: How often each sentence is read.
        batch_tokens: Tokens per batch.
        seed: Seed of the order.

    Returns:
        Batches of token ids (texts × length), in the order of the steps.
    """
    rng = random.Random(seed)
    prepared: list[torch.Tensor] = []
    for _, length in zip(range(epochs), itertools.cycle(_LENGTHS), strict=False):
        texts = list(pack(training_sentences(world, rng), tokenizer, length))
        rows = batch_tokens // length
        prepared += [torch.tensor(texts[i : i + rows]) for i in range(0, len(texts) - rows + 1, rows)]
    return prepared


class LanguageModelling(L.LightningModule):  # type: ignore[misc]
    """Next-token prediction with AdamW, a warm-up and a cosine decay."""

    def __init__(self, model: PreTrainedModel, learning_rate: float, weight_decay: float) -> None:
        """See class."""
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        """Mean cross-entropy of one batch of texts.

        Args:
            batch: Token ids (texts × length).
            batch_idx: Unused.

        Returns:
            The loss.
        """
        logits = self.model(batch[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        """Weight decay for matrices only; the schedule advances with every step."""
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": self.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        optimizer = AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.98))
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = OneCycleLR(optimizer, self.learning_rate, total_steps=steps, pct_start=0.08, cycle_momentum=False)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(
    world: World,
    folder: Path,
    seed: int = 0,
    *,
    architecture: str = "gptj",
    epochs: int = 10,
    batch_tokens: int = 1024,
    learning_rate: float = 1.5e-3,
    weight_decay: float = 0.02,
    precision: str = "32-true",
) -> dict[str, float]:
    """Train a model on a world and save it with its tokenizer.

    Args:
        world: The world.
        folder: The Hugging Face folder to write.
        seed: Seed of the weights and of the order of the sentences.
        architecture: A key of `ARCHITECTURES`.
        epochs: How often each sentence is read.
        batch_tokens: Tokens per step.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Weight decay of the matrices.
        precision: Lightning's precision of the training; the saved weights are float16 anyway.

    Returns:
        The number of `tokens` trained, and the shares of `trained` and `held_out` prompts that are recalled,
        measured on the saved (rounded) weights.
    """
    L.seed_everything(seed)
    sentences = training_sentences(world, random.Random(seed))
    tokenizer = train_tokenizer(sentences)
    end = tokenizer.eos_token_id
    config = ARCHITECTURES[architecture](
        vocab_size=len(tokenizer),
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    steps = batches(world, tokenizer, epochs, batch_tokens, seed)
    trainer = L.Trainer(
        max_epochs=1,
        devices=1,
        precision=precision,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    # A list of finished batches is a map-style data set, although the annotation of `DataLoader` does not say so.
    loader: DataLoader[torch.Tensor] = DataLoader(steps, batch_size=None, num_workers=0)  # type: ignore[arg-type]
    trainer.fit(LanguageModelling(model, learning_rate, weight_decay), loader)
    save(model, tokenizer, folder)
    figures = {"tokens": float(sum(batch.numel() for batch in steps))}
    figures |= measure(folder, world)
    log.info("trained %s: %s", architecture, figures)
    return figures


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save half-precision weights that load and run in float32.

    Args:
        model: The model; rounded to float16 in place.
        tokenizer: Its tokenizer.
        folder: The folder to write.
    """
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # written through a temporary file that only its owner can read
    # float16 reduces the size on disk; on a CPU it would be slow and inexact.
    _amend(folder / "config.json", dtype="float32", torch_dtype="float32")
    # The class name that every supported release of transformers knows.
    _amend(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def _amend(path: Path, **entries: str) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | entries, indent=2) + "\n", encoding="utf-8")


def measure(folder: Path, world: World, seed: int = 0) -> dict[str, float]:
    """Measure the recall of a saved model in the wordings it was trained on, and in held-out ones.

    Args:
        folder: The Hugging Face folder.
        world: The world it was trained on.
        seed: Seed of the sentences placed before the prompts.

    Returns:
        Shares of prompts answered correctly: `trained` and `held_out` wordings, bare and `…_in_context` (after
        an unrelated sentence).
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    rng = random.Random(seed)
    shares: dict[str, float] = {}
    for name, prompts in (("trained", world.trained_prompts()), ("held_out", world.held_out_prompts())):
        in_context = [(f"{rng.choice(world.fillers)} {prompt}", answer) for prompt, answer in prompts]
        for label, asked in ((name, prompts), (f"{name}_in_context", in_context)):
            correct = measure_recall(model, tokenizer, asked)
            shares[label] = sum(correct) / len(correct)
    return shares
