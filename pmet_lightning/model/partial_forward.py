"""Passes that begin at a layer: no delta reaches the layers below L, so what enters L is computed once.

Legend: R = rows, S = tokens run, N = some tokens, F = model width, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pmet_lightning.data.token_rows import RowBatch
from pmet_lightning.model.forward import run_to
from pmet_lightning.model.hooks import run_at, stop_after, stop_before
from pmet_lightning.model.kv_prefix import Prefix


class PartialForward:
    """Lets forward passes begin at a layer, with hidden states that entered it in a pass before.

    Args:
        layers: All layers of the model, or the first.
        start: L + 1; passes can begin at this layer and at the one below.
        token_modules: What maps each token by itself in the layers from the last of these on.
        last_modules: Those of them that only the logits need: in the model's last layer, behind its keys and values.
        direct: Whether layers may be called without the model around them, which gives the same (see :class:`Replay`).
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        start: int,
        token_modules: Sequence[nn.Module] = (),
        last_modules: Sequence[nn.Module] = (),
        direct: bool = True,
    ) -> None:
        self.below, self.layer, self.above = list(layers[:start]), layers[start], list(layers[start + 1 :])
        self.direct = direct
        self.token_modules = {module: module in set(last_modules) for module in token_modules}
        inside = set(self.layer.modules())
        self._in_layer = [module for module in token_modules if module in inside and module not in set(last_modules)]
        self._steady: list[nn.Module] | None = None  # of these, what a change at the first token does not reach
        self._tuples = False

    @torch.no_grad()
    def entering_states(self, model: nn.Module, rows: RowBatch, prefix: Prefix | None) -> tuple[Tensor, Tensor]:
        """What enters the last layer but one and the last, shape [R, S, F] each; the pass ends there."""
        seen: list[Tensor] = []

        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])

        with ExitStack() as stack:
            stack.callback(self.below[0].register_forward_hook(self._note_kind).remove)
            stack.callback(self.below[-1].register_forward_pre_hook(record, with_kwargs=True).remove)
            stack.enter_context(stop_before(self.layer, record))
            run_to(model, rows, prefix)
        return seen[0].to(rows.input_ids.device), seen[1].to(rows.input_ids.device)

    def start_from(self, hidden_RSF: Tensor, at: nn.Module) -> AbstractContextManager[None]:
        """Have the passes inside begin with these states, at one of the last two layers."""
        layers = [*self.below, self.layer]
        return start_at_layer(layers, layers.index(at), hidden_RSF, self._tuples)

    def logits(self, model: nn.Module, hidden_NF: Tensor) -> Tensor:
        """Logits [N, V] of what leaves the last layer at some tokens."""
        from transformers import DynamicCache

        layers = [*self.below, self.layer, *self.above]
        # A row for each token. Neither of input ids nor without a cache: then a model looks for padding in them, or for
        # several texts in one row, and waits for the device.
        nothing = hidden_NF.new_zeros(len(hidden_NF), 1, model.get_input_embeddings().embedding_dim)  # type: ignore[operator]
        with start_at_layer(layers, len(layers), hidden_NF.unsqueeze(1), self._tuples):
            logits: Tensor = model(inputs_embeds=nothing, past_key_values=DynamicCache(), use_cache=False).logits
        return logits.squeeze(1).to(hidden_NF.device)

    def unaffected_outputs(
        self, model: nn.Module, rows: RowBatch, prefix: Prefix | None, hidden_RSF: Tensor
    ) -> dict[nn.Module, Tensor]:
        """What projections and FFN of the last layer give that a change at the rows' first tokens does not reach there.

        Keys, values and queries of the other tokens do not depend on it, and in parallel blocks the FFN does not. Which
        ones is tried out, once.

        Args:
            model: The language model.
            rows: What is run.
            prefix: What stands before the rows.
            hidden_RSF: What enters the layer.
        """
        if not self._in_layer or hidden_RSF.shape[1] == 1:
            return {}
        found = self._outputs(model, rows, prefix, hidden_RSF)
        if self._steady is None:
            changed = hidden_RSF.clone()
            changed[:, 0] = hidden_RSF[:, 0].flip(-1)
            others = self._outputs(model, rows, prefix, changed)
            self._steady = [m for m, seen in found.items() if torch.equal(others[m][:, 1:], seen[:, 1:])]
        return {module: found[module] for module in self._steady}

    @torch.no_grad()
    def _outputs(
        self, model: nn.Module, rows: RowBatch, prefix: Prefix | None, hidden_RSF: Tensor
    ) -> dict[nn.Module, Tensor]:
        """What the modules in the last layer give, shape [R, S, F] each."""
        shape, found = rows.input_ids.shape, {}

        def record(module: nn.Module, _: Any, output: Tensor) -> None:
            found[module] = output.clone().reshape(*shape, -1)  # Falcon adds to it in place

        with ExitStack() as stack:
            for module in self._in_layer:
                stack.callback(module.register_forward_hook(record).remove)
            stack.enter_context(self.start_from(hidden_RSF, self.layer))
            stack.enter_context(stop_after(self.layer))
            run_to(model, rows, prefix)
        return found

    @contextmanager
    def only_tokens(
        self, rows: RowBatch, real_N: Tensor, labelled_N: Tensor, kept: Mapping[nn.Module, Tensor]
    ) -> Iterator[None]:
        """Have the passes inside run nothing on padding that they need not, and the last FFN only for the logits.

        Args:
            rows: What is run.
            real_N: Places of real tokens, counted over all rows.
            labelled_N: Those whose logits are wanted.
            kept: What modules give that need to be run at the rows' first tokens only.
        """
        shape = tuple(rows.input_ids.shape)
        firsts = torch.arange(len(rows), device=real_N.device) * shape[1]
        with ExitStack() as stack:
            for module, is_last in self.token_modules.items():
                positions = firsts if module in kept else labelled_N if is_last else real_N
                if len(positions) < rows.input_ids.numel():
                    stack.enter_context(run_at(module, positions, shape, kept.get(module)))  # type: ignore[arg-type]
            yield

    def _note_kind(self, _: nn.Module, __: Any, output: Any) -> None:
        self._tuples = isinstance(output, tuple)


class Replay:
    """Layers called one after the other with what the model gave them in a pass over the same rows.

    Besides hidden states these are masks, positions and the like, which a model makes anew in every pass; on a GPU it
    waits for the device where it looks into a mask.

    Args:
        layers: In their order.
        prefix: What stands before the rows.
    """

    def __init__(self, layers: Sequence[nn.Module], prefix: Prefix) -> None:
        self.layers, self.prefix = list(layers), prefix
        self._given: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    @property
    def ready(self) -> bool:
        """Whether a pass was listened to in which every layer was handed a cache."""
        if len(self._given) < len(self.layers):
            return False
        values = [(*args, *kwargs.values()) for args, kwargs in self._given.values()]
        return all(any(map(self._is_cache, given)) for given in values)

    @contextmanager
    def capture_inputs(self) -> Iterator[None]:
        """Keep what the layers are given in the pass inside."""

        def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # In place of the hidden states, and in their form, comes what a run begins with.
            self._given[layer] = (None, *args[1:]) if args else (), kwargs | ({} if args else {"hidden_states": None})

        with ExitStack() as stack:
            for layer in self.layers:
                stack.callback(layer.register_forward_pre_hook(keep, with_kwargs=True).remove)
            yield

    def run(self, hidden_RSF: Tensor) -> Tensor:
        """What leaves the last of the layers, shape [R, S, F].

        Args:
            hidden_RSF: What enters the first.
        """
        cache = self.prefix.fresh()
        for layer in self.layers:
            args, kwargs = self._given[layer]
            own = [cache if self._is_cache(value) else value for value in args]
            named = {name: cache if self._is_cache(value) else value for name, value in kwargs.items()}
            if own:
                own[0] = hidden_RSF
            else:
                named["hidden_states"] = hidden_RSF
            output = layer(*own, **named)
            hidden_RSF = output[0] if isinstance(output, tuple) else output
        return hidden_RSF

    def _is_cache(self, value: Any) -> bool:
        return isinstance(value, type(self.prefix.cache))


@contextmanager
def start_at_layer(layers: Sequence[nn.Module], start: int, hidden_RSF: Tensor, tuples: bool) -> Iterator[None]:
    """Have the passes inside begin with given hidden states at a layer, or behind the last one.

    Args:
        layers: The model's first layers, or all.
        start: Which of them the states enter; the number of layers for what comes behind the last.
        hidden_RSF: The states.
        tuples: Whether the layers return tuples.
    """

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return ((hidden_RSF, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden_RSF})

    # Behind the last layer states come by passing through it.
    entered = layers[min(start, len(layers) - 1)]
    with ExitStack() as stack:
        for layer in layers[:start]:
            stack.enter_context(pass_through(layer, tuples))
        stack.callback(entered.register_forward_pre_hook(enter, with_kwargs=True).remove)
        yield


@contextmanager
def pass_through(layer: nn.Module, is_tuple: bool) -> Iterator[None]:
    """Let a layer hand on what it gets."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden,) if is_tuple else hidden

    kept = vars(layer).get("forward")
    layer.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if kept is None:
            del layer.forward
        else:
            layer.forward = kept  # type: ignore[method-assign]
