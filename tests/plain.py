"""The method written out plainly from METHOD.md: one edit at a time, whole model, explicit inverse.

The slow, obvious twin that the editor is compared with; it shares no code with it but the data classes and, for the
families that norm what they add, ``pull_back``, which has a twin of its own.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from pmet_lightning.model.output_norms import pull_back


def locate(tokenizer, text: str, end: int) -> int:
    """Index of the token that holds the character before ``end``."""
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return max(i for i, (a, b) in enumerate(offsets) if a <= end - 1 < b)


def plain_target(model, tokenizer, attn, ffn, edit, contexts, *, steps, lr, clamp, nll, kl, norm):
    """v* of one edit, and the number of iterations."""
    target = " " + edit.target.strip()
    target_ids = tokenizer(target, add_special_tokens=False)["input_ids"]
    rows = []  # ids, subject index, is a fact
    for context in ("{}", *contexts):
        head = context.split("{}")[0] + edit.prompt.split("{}")[0] + edit.subject
        text = context.replace("{}", edit.prompt.replace("{}", edit.subject)) + target
        rows.append((tokenizer(text)["input_ids"][:-1], locate(tokenizer, text, len(head))))
    anchor = f"{edit.subject} is a"
    rows.append((tokenizer(anchor)["input_ids"], locate(tokenizer, anchor, len(edit.subject))))
    deltas: dict[str, torch.Tensor] = {}
    clean: dict[str, torch.Tensor] = {}
    place = {"index": 0}

    def hook_for(name):
        def hook(_, __, output):  # [1, T, F], or [T, F] in OPT
            if name not in clean:
                clean[name] = output.reshape(-1, output.shape[-1])[place["index"]].detach().clone()
                deltas[name] = torch.zeros_like(clean[name], requires_grad=True)
            added = torch.zeros_like(output)
            added[..., place["index"], :] = 1
            return output + added * deltas[name]

        return hook

    handles = [attn.register_forward_hook(hook_for("attn")), ffn.register_forward_hook(hook_for("ffn"))]
    try:
        optimizer, factor, first_kl = None, nll, None
        for step in range(steps):
            losses, argmax = [], []
            for ids, index in rows[:-1]:
                place["index"] = index
                logits = model(torch.tensor([ids])).logits[0, -len(target_ids) :]
                losses.append(F.cross_entropy(logits, torch.tensor(target_ids)))
                argmax.append(bool((logits.argmax(-1) == torch.tensor(target_ids)).all()))
            ids, place["index"] = rows[-1]
            log_p = model(torch.tensor([ids])).logits[0, place["index"]].log_softmax(-1)
            first_kl = log_p.detach() if first_kl is None else first_kl
            loss_kl = kl * F.kl_div(first_kl, log_p, log_target=True, reduction="sum")
            loss_norm = norm * sum(deltas[n].norm() / clean[n].norm() ** 2 for n in deltas)
            loss = factor * sum(losses) / len(losses) + loss_kl + loss_norm
            if loss < 0.05:
                break
            factor = 0.1 * nll if all(argmax) else nll
            if (all(argmax) and loss_kl <= 0.01) or step == steps - 1:
                break
            optimizer = optimizer or torch.optim.Adam(list(deltas.values()), lr=lr)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for name, delta in deltas.items():
                    radius = clamp * clean[name].norm()
                    if delta.norm() > radius:
                        delta *= radius / delta.norm()
    finally:
        for handle in handles:
            handle.remove()
    return clean["ffn"] + deltas["ffn"].detach(), step + 1


def plain_record(model, tokenizer, module, edit, context, *, output: bool):
    """Input or output of a module at the subject's last token, without the target."""
    head = context.split("{}")[0] + edit.prompt.split("{}")[0] + edit.subject
    text = context.replace("{}", edit.prompt.replace("{}", edit.subject))
    index, seen = locate(tokenizer, text, len(head)), []
    handle = module.register_forward_hook(
        lambda _, i, o: seen.append((o if output else i[0])[..., index, :].flatten().clone())
    )
    with torch.no_grad():
        model(torch.tensor([tokenizer(text)["input_ids"]]))
    handle.remove()
    return seen[0]


def plain_spread(model, tokenizer, projections, edits, targets, contexts, moments, lam, norms=None):
    """Write the edits into the model; returns ΔW [out, in] of each layer, lowest first.

    ``norms``: what stands between each projection and the residual stream, in families that have it.
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
            share = pull_back(norms[i], torch.stack(here), wanted).T
        else:
            share = (goal - value).T.double() / (len(projections) - i) ** 0.5
        update = share @ k.T @ torch.inverse(lam * moments[i].double() + k @ k.T)
        weight = projection.weight
        transposed = type(projection).__name__ == "Conv1D"
        with torch.no_grad():
            weight += (update.T if transposed else update).to(weight.dtype)
        updates.append(update)
    return updates
