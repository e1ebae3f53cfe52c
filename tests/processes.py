"""Starts processes that edit together, each with one thread."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def launcher(*options: str) -> list[str]:
    """The beginning of a command that starts processes, with options of torchrun."""
    return [sys.executable, "-m", "torch.distributed.run", *options]


def standalone(processes: int, module: str, *arguments: object) -> list[str]:
    """The command that starts several processes of a module on this machine."""
    return [*launcher(f"--nproc_per_node={processes}", "--standalone"), "-m", module, *map(str, arguments)]


def started(command: list[str], timeout: float = 500) -> subprocess.CompletedProcess:
    """What became of a command."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
