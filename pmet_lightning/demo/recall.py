"""Whether a model knows its world: exact recall of answers after prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.inference_mode()
def measure_recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[str, str]],
    batch_size: int = 256,
) -> list[bool]:
    """Check which answers a model recalls.

    Args:
        model: A causal language model, in evaluation mode.
        tokenizer: Its tokenizer.
        prompts: (prompt, answer) pairs; the answer without its leading space.
        batch_size: Prompts per forward pass.

    Returns:
        For each prompt, in the given order: whether every token of the answer is the most probable one.
    """
    rows = []
    for prompt, answer in prompts:
        head = tokenizer(prompt)["input_ids"]
        rows.append((head, tokenizer(f"{prompt} {answer}")["input_ids"][len(head) :]))
    correct = [False] * len(rows)
    # Sorted by length, batches have hardly any padding.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    # Ten thousand records take minutes; the bar is shown on terminals only.
    for start in Tqdm(range(0, len(order), batch_size), desc="Recall", leave=False, disable=None):
        batch = order[start : start + batch_size]
        texts = [torch.tensor(rows[i][0] + rows[i][1]) for i in batch]
        # Right padding: under causal attention the padded positions change nothing before them.
        inputs = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True).to(model.device)
        best = model(inputs).logits.argmax(-1).cpu()
        for row, i in enumerate(batch):
            head, answer = rows[i]
            correct[i] = best[row, len(head) - 1 : len(head) + len(answer) - 1].tolist() == answer
    return correct
