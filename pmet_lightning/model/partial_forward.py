"""Forward passes that begin at a layer: no delta reaches the layers below L, so the input of L is computed once.

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
from pmet_lightning.model.hooks import record_whole, run_at, stop_after, stop_before
from pmet_lightning.model.kv_prefix import Prefix


class PartialForward:
    """Lets forward passes begin at a layer, with the hidden states that entered it in an earlier pass.

    Args:
        layers: All layers of the model, or the first ones.
        start: L + 1; passes can begin at this layer and at the one below, L.
        token_modules: Modules that map each token independently, in the layers from ``start`` on.
        last_modules: Those of them that only the logits need: in the model's last layer, after its keys and values.
        direct: Whether layers may be called without the model around them, with the same result (see :class:`Replay`).
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
        self._unaffected: list[nn.Module] | None = None  # those that a change at the first token does not reach
        self._tuples = False

    @torch.no_grad()
    def entering_states(self, model: nn.Module, rows: RowBatch, prefix: Prefix | None) -> tuple[Tensor, Tensor]:
        """The inputs of the layers L and L + 1, shape [R, S, F] each; the pass ends there."""
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
        """Begin the passes inside with these states, at layer L or L + 1."""
        layers = [*self.below, self.layer]
        return start_at_layer(layers, layers.index(at), hidden_RSF, self._tuples)

    def run_layers(self, model: nn.Module, rows: RowBatch, replay: Replay, entering_RSF: Tensor) -> Tensor:
        """The output of the last of some layers, shape [R, S, F].

        Args:
            model: The language model.
            rows: The rows to run, the same at every call with one replay.
            replay: Layers that begin at L or L + 1; called by themselves as soon as a pass has shown how.
            entering_RSF: Input of the first.
        """
        if self.direct and replay.ready:
            return replay.run(entering_RSF)
        last = replay.layers[-1]
        with (
            self.start_from(entering_RSF, replay.layers[0]),
            record_whole(last, len(rows)) as output,
            replay.capture_inputs(),
            stop_after(last),
        ):
            run_to(model, rows, replay.prefix)
        return output.take()

    def logits(self, model: nn.Module, hidden_NF: Tensor) -> Tensor:
        """Logits [N, V] from the output of the model's last layer at some tokens."""
        from transformers import DynamicCache

        layers = [*self.below, self.layer, *self.above]
        # One row per token. Given input ids, or no cache, a model would look for padding, or for several texts in one
        # row, and wait for the device.
        placeholder = hidden_NF.new_zeros(len(hidden_NF), 1, model.get_input_embeddings().embedding_dim)  # type: ignore[operator]
        with start_at_layer(layers, len(layers), hidden_NF.unsqueeze(1), self._tuples):
            logits: Tensor = model(inputs_embeds=placeholder, past_key_values=DynamicCache(), use_cache=False).logits
        return logits.squeeze(1).to(hidden_NF.device)

    def unaffected_outputs(
        self, model: nn.Module, rows: RowBatch, prefix: Prefix | None, hidden_RSF: Tensor
    ) -> dict[nn.Module, Tensor]:
        """Outputs of projections and FFN in layer L + 1 that change only at the first tokens when these change.

        Keys, values and queries of the other tokens do not depend on the first, nor does the FFN in parallel blocks.
        Which modules these are is found by a trial, once.

        Args:
            model: The language model.
            rows: The rows to run.
            prefix: Cached tokens that precede the rows.
            hidden_RSF: Input of the layer.
        """
        if not self._in_layer or hidden_RSF.shape[1] == 1:
            return {}
        found = self._outputs(model, rows, prefix, hidden_RSF)
        if self._unaffected is None:
            changed = hidden_RSF.clone()
            changed[:, 0] = hidden_RSF[:, 0].flip(-1)
            after = self._outputs(model, rows, prefix, changed)
            self._unaffected = [m for m, seen in found.items() if torch.equal(after[m][:, 1:], seen[:, 1:])]
        return {module: found[module] for module in self._unaffected}

    @torch.no_grad()
    def _outputs(
        self, model: nn.Module, rows: RowBatch, prefix: Prefix | None, hidden_RSF: Tensor
    ) -> dict[nn.Module, Tensor]:
        """Outputs of the token modules in layer L + 1, shape [R, S, F] each."""
        shape, found = rows.input_ids.shape, {}

        def record(module: nn.Module, _: Any, output: Tensor) -> None:
            found[module] = output.clone().reshape(*shape, -1)  # Falcon modifies it in place

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
        """Run token modules in the passes inside on real tokens only, and the last FFN only where logits are wanted.

        Args:
            rows: The rows to run.
            real_N: Positions of real tokens, counted over all rows.
            labelled_N: Positions of those whose logits are wanted.
            kept: Outputs of the modules that need to be run at the rows' first tokens only.
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
    """Calls layers one after the other, with the arguments that the model gave them in a pass over the same rows.

    Besides hidden states these are masks, positions and the like, which a model builds again in every pass; on a GPU it
    waits for the device where it reads a mask.

    Args:
        layers: The layers, in order.
        prefix: Cached tokens that precede the rows.
    """

    def __init__(self, layers: Sequence[nn.Module], prefix: Prefix) -> None:
        self.layers, self.prefix = list(layers), prefix
        self._given: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    @property
    def ready(self) -> bool:
        """Whether a pass was captured in which every layer got a cache."""
        if len(self._given) < len(self.layers):
            return False
        values = [(*args, *kwargs.values()) for args, kwargs in self._given.values()]
        return all(any(map(self._is_cache, given)) for given in values)

    @contextmanager
    def capture_inputs(self) -> Iterator[None]:
        """Record the arguments of the layers in the pass inside."""

        def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # A run puts its own hidden states here, by position or by name as the model did.
            self._given[layer] = (None, *args[1:]) if args else (), kwargs | ({} if args else {"hidden_states": None})

        with ExitStack() as stack:
            for layer in self.layers:
                stack.callback(layer.register_forward_pre_hook(keep, with_kwargs=True).remove)
            yield

    def run(self, hidden_RSF: Tensor) -> Tensor:
        """The output of the last of the layers, shape [R, S, F].

        Args:
            hidden_RSF: Input of the first.
        """
        cache = self.prefix.fresh()
        for layer in self.layers:
            args, kwargs = self._given[layer]
            positional = [cache if self._is_cache(value) else value for value in args]
            named = {name: cache if self._is_cache(value) else value for name, value in kwargs.items()}
            if positional:
                positional[0] = hidden_RSF
            else:
                named["hidden_states"] = hidden_RSF
            output = layer(*positional, **named)
            hidden_RSF = output[0] if isinstance(output, tuple) else output
        return hidden_RSF

    def _is_cache(self, value: Any) -> bool:
        return isinstance(value, type(self.prefix.cache))


@contextmanager
def start_at_layer(layers: Sequence[nn.Module], start: int, hidden_RSF: Tensor, tuples: bool) -> Iterator[None]:
    """Begin the passes inside with given hidden states at a layer, or after the last one.

    Args:
        layers: The model's first layers, or all.
        start: Index of the layer that the states enter; the number of layers to begin after the last.
        hidden_RSF: The states.
        tuples: Whether the layers return tuples.
    """

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return ((hidden_RSF, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden_RSF})

    # To begin after the last layer, the states pass through it.
    entered = layers[min(start, len(layers) - 1)]
    with ExitStack() as stack:
        for layer in layers[:start]:
            stack.enter_context(pass_through(layer, tuples))
        stack.callback(entered.register_forward_pre_hook(enter, with_kwargs=True).remove)
        yield


@contextmanager
def pass_through(layer: nn.Module, is_tuple: bool) -> Iterator[None]:
    """Make a layer return its input unchanged."""

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
