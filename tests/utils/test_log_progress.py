"""Progress is a bar on a terminal, and lines of the log anywhere else."""

from __future__ import annotations

import io
import logging

from pmet_lightning.utils.log_progress import LogBar, progress


def test_a_log_gets_a_line_from_time_to_time(caplog, capsys):
    caplog.set_level(logging.INFO)
    with LogBar(4, "Tracing", seconds=0) as bar:
        caplog.clear()
        bar.update(1)
        bar.update(2)
    assert [message.partition(",")[0] for message in caplog.messages] == ["Tracing: 25 %", "Tracing: 75 %"]
    assert caplog.messages[0].endswith(" left")
    assert capsys.readouterr() == ("", "")


def test_what_is_done_soon_is_not_in_the_log(caplog, capsys):
    caplog.set_level(logging.INFO)
    with progress(4, "Tracing") as bar:
        bar.update(4)
    assert isinstance(bar, LogBar)
    assert not caplog.messages
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with progress(4, "Tracing") as bar:
        bar.update(2)
        bar.refresh()
    assert "Tracing:  50%|" in terminal.getvalue()
    assert not caplog.messages
