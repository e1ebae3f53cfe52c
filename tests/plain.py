"""The write, plainly: one prompt at a time, the whole model, an explicit inverse.

The slow, obvious twin that the editor is compared with, as benchmarks/plain.py is of its target vectors; it shares no
code with the package.
"""

from __future__ import annotations

import torch
from scipy.optimize import brentq


def locate(tokenizer, text: str, end: int) -> int:
    """Index of the token that holds the character before ``end``."""
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return max(i for i, (a, b) in enumerate(offsets) if a <= end - 1 < b)


def plain_record(model, tokenizer, module, edit, context, *, output: bool):
    """Input or output of a module at the subject's last token, without the target."""
    head = context.split("{}")[0] + edit.prompt.split("{}")[0] + edit.subject
    text = context.replace("{}", edit.prompt.replace("{}", edit.subject))
    index, seen = locate(tokenizer, text, len(head)), []

    def keep(_, inputs, found):
        whole = inputs[0] if not output else found[0] if isinstance(found, tuple) else found
        seen.append(whole[..., index, :].flatten().clone())

    handle = module.register_forward_hook(keep)
    with torch.no_grad():
        model(torch.tensor([tokenizer(text)["input_ids"]]))
    handle.remove()
    return seen[0]


def plain_rest(model, tokenizer, module, edit):
    """The sum of k kᵀ over a module's inputs at the tokens after the subject, up to the target's last but one."""
    head, text = edit.prompt.split("{}")[0] + edit.subject, edit.prompt.replace("{}", edit.subject)
    index, ids, seen = locate(tokenizer, text, len(head)), tokenizer(f"{text} {edit.target}")["input_ids"], []
    handle = module.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].reshape(len(ids) - 1, -1)))
    with torch.no_grad():
        model(torch.tensor([ids[:-1]]))
    handle.remove()
    return sum(torch.outer(k, k) for k in seen[0][index + 1 :].double())


def turned(norm, p, change):
    """What to add to p, which keeps its length, so that norm(p) comes as near to norm(p) + change as it can.

    norm(p) is g ⊙ u with ‖u‖² = F. The nearest point to a goal has a Lagrange multiplier μ: u = g ⊙ goal / (g² + μ).
    """
    g = norm(torch.ones_like(p)).double().numpy()
    goal = (norm(p) + change).double().numpy()

    def excess(mu):
        return float(((g * goal / (g**2 + mu)) ** 2).sum()) - len(g)

    most = float((g * goal) @ (g * goal))
    mu = brentq(excess, 0.0, most, xtol=1e-300, rtol=1e-15, maxiter=1000) if excess(0.0) > 0 else 0.0
    direction = torch.from_numpy(g * goal / (g**2 + mu))
    return direction * (p.double().norm() / direction.norm()) - p.double()


def plain_spread(model, tokenizer, projections, edits, targets, contexts, moments, lam, norms=None, mu=0.0):
    """Write the edits into the model; returns ΔW [out, in] of each layer, lowest first.

    ``norms``: what is between each projection and the residual stream, in families that have it.
    ``mu``: weight of the tokens after the subject, in these edits.
    """
    updates = []
    for i, projection in enumerate(projections):
        keys = []
        for edit in edits:
            bare = plain_record(model, tokenizer, projection, edit, "{}", output=False)
            others = [plain_record(model, tokenizer, projection, edit, c, output=False) for c in contexts]
            keys.append((bare + sum(others) / len(others)) / 2)
        k = torch.stack(keys, dim=1).double()
        now = [plain_record(model, tokenizer, projections[-1], edit, "{}", output=True) for edit in edits]
        goal, value = torch.stack(targets), torch.stack(now)
        if norms:
            wanted = (norms[-1](goal) - norms[-1](value)) / (len(projections) - i) ** 0.5
            here = [plain_record(model, tokenizer, projection, edit, "{}", output=True) for edit in edits]
            share = torch.stack([turned(norms[i], p, w) for p, w in zip(here, wanted, strict=True)], dim=1)
        else:
            share = (goal - value).T.double() / (len(projections) - i) ** 0.5
        rest = sum(plain_rest(model, tokenizer, projection, edit) for edit in edits) if mu else 0.0
        update = share @ k.T @ torch.inverse(lam * moments[i].double() + mu * rest + k @ k.T)
        weight = projection.weight
        transposed = type(projection).__name__ == "Conv1D"
        with torch.no_grad():
            weight += (update.T if transposed else update).to(weight.dtype)
        updates.append(update)
    return updates
