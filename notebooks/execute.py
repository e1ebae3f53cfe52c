"""Executes notebooks in fresh kernels and keeps what they show: ``python notebooks/execute.py [FILE ...]``.

What is kept does not change from run to run: no times, no messages on the error stream, no counts of executions.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
_MOST_SECONDS = 600  # for one cell; more than any takes, but an end if one hangs


def executed(path: Path, folder: str | Path) -> Any:
    """A notebook with what its cells show when they are run from a clean state.

    Its home is an empty folder too, so that nothing that was computed and kept before is used.

    Args:
        path: The notebook.
        folder: An empty folder in which it is run.

    Raises:
        CellExecutionError: If a cell fails.
        CellTimeoutError: If one takes too long.
    """
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.get("outputs", []).clear()
    place = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=_MOST_SECONDS, coalesce_streams=True, resources=place)
    with tempfile.TemporaryDirectory() as home:
        client.execute(env={**os.environ, "HOME": home})
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [_plain(output) for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def _plain(output: Any) -> Any:
    """An output without the number of its execution."""
    if "execution_count" in output:
        output.execution_count = None
    return output


def main(names: list[str]) -> None:
    """Execute notebooks, by default all of them, and store what they show; say how long each took."""
    for path in [Path(name) for name in names] or sorted(FOLDER.glob("*.ipynb")):
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(executed(path, folder), path)
        print(f"{path.stem}: {time.monotonic() - start:.0f} s")  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
