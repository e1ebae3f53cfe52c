"""What editing inside someone else's program leaves as it was: modes, flags, random numbers, log levels, interrupts."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from pmet_lightning.model.loading import fuse_gelu
from pmet_lightning.run.trainer import ignore_expected_warnings

_TALKATIVE = ("lightning.pytorch", "lightning.fabric")  # they say which devices there are, and how a fit ended


@contextmanager
def preserve_caller_state(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Work on someone else's model; afterwards nothing but its weights may be different.

    The model is frozen and in eval mode meanwhile. Gradients can be taken inside whatever the surroundings say.

    Args:
        model: The model.
        device: Where it is.

    Raises:
        KeyboardInterrupt: After Ctrl-C, of which Lightning makes an exit of the program.
    """
    with ExitStack() as stack:
        stack.enter_context(_interrupts_raised())
        stack.enter_context(isolate_rng())
        stack.enter_context(ignore_expected_warnings())
        stack.enter_context(_quiet())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.cuda.device(device) if device.type == "cuda" else nullcontext())
        stack.enter_context(_fused(model))
        stack.enter_context(_frozen(model))
        yield


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients; each module's mode and each parameter's flag come back."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _fused(model: nn.Module) -> Iterator[None]:
    """Activations as in a model that is loaded here; the program's own come back."""
    replaced = fuse_gelu(model)
    try:
        yield
    finally:
        for module, name, activation in replaced:
            setattr(module, name, activation)


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning's loggers say nothing below a warning."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _interrupts_raised() -> Iterator[None]:
    """Ctrl-C arrives as what it is, and can be given again."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise
    finally:
        if threading.current_thread() is threading.main_thread() and handler is not None:
            signal.signal(signal.SIGINT, handler)
