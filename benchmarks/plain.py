"""Plain implementation of the target vectors (docs/method.md, 'Targets'): one edit at a time, through the whole model.

All rows of an edit run in one pass. Other editors do it so; ours is timed against it and, in the tests, compared
with. It shares no code with the package; the authors' golden numbers check it (tests/write/test_golden.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from pmet_lightning.data.records import Edit


def last_token(tokenizer: Any, text: str, end: int) -> int:
    """Index of the token that holds the character before ``end``."""
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return max(i for i, (start, stop) in enumerate(offsets) if start < end <= stop)


def rows_of(tokenizer: Any, edit: Edit, contexts: Sequence[str]) -> tuple[list[list[int]], list[int], list[int]]:
    """Tokens of all rows, the KL prompt last; the position of the subject's last token in each; the target's tokens."""
    target = " " + edit.target.strip()
    labels = tokenizer(target, add_special_tokens=False)["input_ids"]
    rows, positions = [], []
    for context in ("{}", *contexts):
        head = context.split("{}")[0] + edit.prompt.split("{}")[0] + edit.subject
        text = context.replace("{}", edit.prompt.replace("{}", edit.subject)) + target
        rows.append(tokenizer(text)["input_ids"][:-1])
        positions.append(last_token(tokenizer, text, len(head)))
    kl_prompt = f"{edit.subject} is a"
    rows.append(tokenizer(kl_prompt)["input_ids"])
    positions.append(last_token(tokenizer, kl_prompt, len(edit.subject)))
    return rows, positions, labels


def plain_target(
    model: nn.Module,
    tokenizer: Any,
    attn: nn.Module,
    ffn: nn.Module,
    edit: Edit,
    contexts: Sequence[str],
    *,
    steps: int,
    lr: float,
    clamp: float,
    nll: float,
    kl: float,
    norm: float,
    loss_tolerance: float = 0.05,
    stop_at_argmax: bool = True,
) -> tuple[Tensor, int]:
    """v* of one edit as the reference stores it (clean output + δm), shape [F], and the number of iterations.

    Args:
        model: The frozen language model.
        tokenizer: Its tokenizer.
        attn: Attention output projection of layer L.
        ffn: FFN output projection of layer L.
        edit: The edit.
        contexts: Templates with one {} each, besides the bare one.
        steps: Maximum number of iterations; the last one makes no update.
        lr: Learning rate of Adam.
        clamp: Radius of the ball of each delta, in norms of its clean output.
        nll: f_nll.
        kl: f_kl.
        norm: f_wd.
        loss_tolerance: The edit stops when its loss is below this.
        stop_at_argmax: Whether the likelihood weighs less once every target token is the argmax, and the edit then
            stops if the KL is small enough.
    """
    rows, positions, labels = rows_of(tokenizer, edit, contexts)
    width, device = max(map(len, rows)), next(model.parameters()).device
    ids = torch.tensor([row + [row[0]] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    every, at = torch.arange(len(rows), device=device), torch.tensor(positions, device=device)
    wanted = torch.tensor(labels, device=device).expand(len(rows) - 1, -1)
    ends = torch.tensor([len(row) for row in rows[:-1]], device=device)
    columns = ends.unsqueeze(1) - len(labels) + torch.arange(len(labels), device=device)
    clean: dict[nn.Module, Tensor] = {}
    deltas: dict[nn.Module, Tensor] = {}

    def add(module: nn.Module, _: Any, output: Tensor) -> Tensor:
        whole = output.view(*ids.shape, -1)  # OPT flattens rows and tokens
        if module not in clean:
            clean[module] = whole[0, positions[0]].detach().to(torch.promote_types(output.dtype, torch.float32))
            deltas[module] = torch.zeros_like(clean[module]).requires_grad_()
        return whole.index_put((every, at), deltas[module].to(output.dtype), accumulate=True).view_as(output)

    with ExitStack() as hooks:
        for module in (attn, ffn):
            hooks.callback(module.register_forward_hook(add).remove)
        optimizer, weight, clean_log_p = None, nll, None
        for step in range(steps):
            logits = model(input_ids=ids, attention_mask=mask).logits
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            log_p = logits[:-1].log_softmax(-1)[every[:-1, None], columns]
            likelihood = -log_p.gather(2, wanted.unsqueeze(2)).mean()
            kl_log_p = logits[-1, positions[-1]].log_softmax(-1)
            clean_log_p = kl_log_p.detach() if clean_log_p is None else clean_log_p
            divergence = kl * nn.functional.kl_div(clean_log_p, kl_log_p, log_target=True, reduction="sum")
            penalty = norm * sum(deltas[m].norm() / clean[m].norm() ** 2 for m in deltas)
            loss = weight * likelihood + divergence + penalty
            if loss < loss_tolerance:
                break
            all_argmax = stop_at_argmax and bool((log_p.argmax(-1) == wanted).all())
            weight = 0.1 * nll if all_argmax else nll
            if (all_argmax and divergence <= 0.01) or step == steps - 1:
                break
            optimizer = optimizer or torch.optim.Adam(list(deltas.values()), lr=lr)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for module, delta in deltas.items():
                    delta *= torch.clamp(clamp * clean[module].norm() / delta.norm(), max=1.0)
    return clean[ffn] + deltas[ffn].detach(), step + 1
