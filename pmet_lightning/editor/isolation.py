"""Restores what editing must not change in the caller: modes, flags, random numbers, log levels, interrupts."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from pmet_lightning.editor.names import arguments_named_in_logs
from pmet_lightning.model.loading import fuse_gelu, plain_outputs
from pmet_lightning.run.trainer import ignore_expected_warnings

_VERBOSE_LOGGERS = ("lightning.pytorch", "lightning.fabric")  # they report the devices, and how a fit ended


@contextmanager
def preserve_caller_state(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Restore the caller's state after work on the caller's model: only the weights may have changed.

    Inside, the model is frozen and in eval mode, and gradients are enabled even if the caller has disabled them.

    Args:
        model: The model.
        device: Where it is.

    Raises:
        KeyboardInterrupt: After Ctrl-C, which Lightning turns into an exit of the program.
    """
    with ExitStack() as stack:
        stack.enter_context(_interrupts_raised())
        stack.enter_context(isolate_rng())
        stack.enter_context(ignore_expected_warnings())
        stack.enter_context(_quiet())
        stack.enter_context(arguments_named_in_logs())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.cuda.device(device) if device.type == "cuda" else nullcontext())
        stack.enter_context(plain_outputs(model))
        stack.enter_context(_fused(model))
        stack.enter_context(_frozen(model))
        yield


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; each module's mode and each parameter's flag are restored."""
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
    """Fused activations, as in a model that this package loads; the caller's own are restored."""
    replaced = fuse_gelu(model)
    try:
        yield
    finally:
        for module, name, activation in replaced:
            setattr(module, name, activation)


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning's loggers show nothing below a warning."""
    loggers = [logging.getLogger(name) for name in _VERBOSE_LOGGERS]
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
    """Ctrl-C is raised as KeyboardInterrupt, and the caller's signal handler is restored."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        cause: BaseException | None = error
        while isinstance(cause, SystemExit):  # Lightning's, and that of a run with a folder
            cause = cause.__context__
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        raise
    finally:
        if threading.current_thread() is threading.main_thread() and handler is not None:
            signal.signal(signal.SIGINT, handler)
