"""A run that is ended from outside."""

from __future__ import annotations

import os
import signal
import sys
import time
import weakref

import pytest

from pmet_lightning.run.ending import ends_with


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C is handled as usual: a shell's background job ignores it."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, inherited)


def at_once(number: int) -> None:
    """Send this process a signal."""
    os.kill(os.getpid(), number)


def in_a_callback(number: int) -> None:
    """Send it where Python drops what a handler raises."""
    thing = type("Thing", (), {})()
    reference = weakref.ref(thing, lambda _: at_once(number))
    del thing
    assert reference() is None


@ends_with(lambda: "nothing is lost")
def wait_for(send, number: int) -> None:
    """Send a signal, and wait."""
    send(number)
    for _ in range(300):
        time.sleep(0.1)


@pytest.mark.parametrize("send", [at_once, in_a_callback])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_block_wherever_it_arrives(number, code, send, caplog):
    before = sys.unraisablehook, signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        wait_for(send, number)
    assert caught.value.code == code
    assert "nothing is lost" in caplog.text
    assert (sys.unraisablehook, signal.getsignal(signal.SIGTERM)) == before


def test_other_errors_in_callbacks_are_shown_as_ever(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)

    def fails(_):
        raise ValueError("in a callback")

    with ends_with(lambda: "nothing is lost"):
        thing = type("Thing", (), {})()
        reference = weakref.ref(thing, fails)
        del thing
    assert reference() is None
    assert [type(one.exc_value) for one in seen] == [ValueError]
