"""The logit lens: what a model would predict if a vector were its residual stream after the last layer.

Final norm and vocabulary head are the model's own, run without its layers, so that whatever a family does there
(scaled or capped logits, a projection after the norm) is included.
Legend: N = vectors, F = model width, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from pmet_lightning.analysis.streams import returns_tuples
from pmet_lightning.data.token_rows import RowBatch, TokenRow, pad_rows
from pmet_lightning.model.architectures import UnknownArchitectureError
from pmet_lightning.model.forward import label_logits, model_inputs, most_logit_rows
from pmet_lightning.model.hooks import stop_before
from pmet_lightning.model.partial_forward import start_at_layer
from pmet_lightning.model.projections import Sites


class Lens:
    """Decodes vectors as if they were the output of the last layer.

    Args:
        model: The language model.
        sites: Its modules.
        device: Where it is.

    Raises:
        UnknownArchitectureError: If there is no norm between the last layer and the vocabulary head.
    """

    def __init__(self, model: nn.Module, sites: Sites, device: torch.device) -> None:
        self.model, self.sites, self.device = model, sites, device
        self.head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
        self.vocabulary = int(self.head.weight.shape[0])  # type: ignore[union-attr,arg-type]
        self.most = most_logit_rows(model)
        self.tuples = returns_tuples(model, sites, self._rows(1))
        self.norm = self._final_norm()
        self.gain, self.shift, self.centred = _parts_of(self.norm, sites.width, next(model.parameters()))

    def _rows(self, count: int) -> RowBatch:
        return pad_rows([TokenRow([0], 0, (0,))] * count, 0).to(self.device)

    @torch.no_grad()
    def logits(self, vectors_NF: Tensor) -> Iterator[Tensor]:
        """Logits, float32, for as many vectors at a time as fit the memory limit; shape [n, V] each."""
        for part in vectors_NF.split(self.most):
            with self._ending_with(part):
                yield label_logits(self.model, self._rows(len(part)))[:, 0].float()

    def probability(self, vectors_NF: Tensor, tokens_N: Tensor) -> Tensor:
        """P of one token for each vector, shape [N], on the CPU."""
        parts = zip(self.logits(vectors_NF), tokens_N.split(self.most), strict=True)
        chosen = [logits.softmax(-1).gather(1, own.to(logits.device).unsqueeze(1)) for logits, own in parts]
        return torch.cat(chosen)[:, 0].cpu()

    def top(self, vectors_NF: Tensor, count: int) -> Tensor:
        """Ids of the tokens with the highest logits, shape [N, count], on the CPU."""
        return torch.cat([logits.topk(count, dim=-1).indices.cpu() for logits in self.logits(vectors_NF)])

    def contribution(self, parts_PNF: Tensor, streams_NF: Tensor, tokens_N: Tensor) -> Tensor:
        """What each summand of some residual streams adds to a token's logit, minus the mean over the vocabulary.

        The final norm's scale is frozen at that of the whole stream, so that the summands' contributions add up. The
        mean is subtracted because a constant added to all logits changes no probability. Logits are the head's output,
        before any scaling or capping.

        Args:
            parts_PNF: Summands of the streams.
            streams_NF: The streams after the last layer.
            tokens_N: A token for each stream.

        Returns:
            Shape [P, N], float32, on the CPU.
        """
        slope_NF = self._slope(streams_NF, tokens_N)
        whole = self._center(streams_NF.float()) * self.gain
        normed = self._run_norm(streams_NF) - self.shift
        # normed = whole / scale; by least squares, since single entries may be zero
        inverse_N = (whole * normed).sum(-1) / whole.square().sum(-1).clamp_min(1e-30)
        pieces = self._center(parts_PNF.float()) * self.gain
        return ((pieces * slope_NF).sum(-1) * inverse_N).cpu()

    def _ending_with(self, vectors_NF: Tensor) -> AbstractContextManager[None]:
        """Make these vectors the output of the last layer in the forward passes inside."""
        layers = list(self.sites.layers)
        return start_at_layer(layers, len(layers), vectors_NF.unsqueeze(1).to(self.device), self.tuples)

    def _center(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=-1, keepdim=True) if self.centred else x

    @torch.no_grad()
    def _run_norm(self, x: Tensor) -> Tensor:
        dtype = next(self.model.parameters()).dtype
        given: Tensor = self.norm(x.to(dtype))
        return given.float()

    def _slope(self, streams_NF: Tensor, tokens_N: Tensor) -> Tensor:
        """Gradient of a token's logit minus the mean logit, with respect to the normed stream."""
        kept: dict[str, Tensor] = {}

        def leaf(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            kept["normed"] = output.detach().requires_grad_(True)
            return kept["normed"]

        def head(_: nn.Module, __: Any, output: Tensor) -> None:
            kept["logits"] = output

        hooks = [self.norm.register_forward_hook(leaf), self.head.register_forward_hook(head)]
        slopes = []
        try:
            for part, tokens in zip(streams_NF.split(self.most), tokens_N.split(self.most), strict=True):
                rows = self._rows(len(part))
                with torch.enable_grad(), self._ending_with(part):
                    self.model(**model_inputs(self.model, rows))
                    logits = kept["logits"].float().reshape(len(part), -1)
                    own = logits.gather(1, tokens.to(logits.device).unsqueeze(1))[:, 0] - logits.mean(dim=-1)
                    slopes.append(torch.autograd.grad(own.sum(), kept["normed"])[0].float().reshape(len(part), -1))
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat(slopes)

    def _final_norm(self) -> nn.Module:
        """The first module that runs after the last layer."""
        inside = {module for layer in self.sites.layers for module in layer.modules()}
        found: list[nn.Module] = []
        after_layers = [False]

        def mark_passed(*_: Any) -> None:
            after_layers[0] = True

        def look(module: nn.Module, _: Any) -> None:
            if after_layers[0]:
                found.append(module)

        hooks = [self.sites.layers[-1].register_forward_hook(mark_passed)]
        hooks += [m.register_forward_pre_hook(look) for m in self.model.modules() if m not in inside]
        try:
            with torch.no_grad(), stop_before(self.head, lambda *_: None):
                self.model(**model_inputs(self.model, self._rows(1)))
        finally:
            for hook in hooks:
                hook.remove()
        return found[0] if found else self.head


def _parts_of(norm: nn.Module, width: int, like: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Gain and shift of a norm, float32, and whether it centers: probed, since families implement norms differently.

    Raises:
        UnknownArchitectureError: If it is not a norm.
    """
    signs = torch.ones(width, dtype=like.dtype, device=like.device)
    signs[1::2] = -1
    probes = torch.stack([torch.zeros_like(signs), signs, 2 * signs, torch.ones_like(signs)])
    with torch.no_grad():
        try:
            zero, one, two, flat = norm(probes.unsqueeze(1))[:, 0].float()
        except (RuntimeError, TypeError, ValueError):
            zero = one = two = flat = torch.full_like(signs, torch.nan).float()
    if zero.shape != signs.shape or not torch.allclose(one, two, rtol=1e-2, atol=1e-3):
        raise UnknownArchitectureError(
            f"between the last layer and the vocabulary head is a {type(norm).__name__}; expected a LayerNorm or a "
            "root-mean-square norm, without which a component's contribution to a logit is not defined"
        )
    return (one - zero) * signs.float(), zero, bool(torch.allclose(flat, zero, rtol=1e-2, atol=1e-3))
