"""state.json: the progress of a run, and how it ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pmet_lightning.utils.files import write_json

STATE = "state.json"


class RunState:
    """The state of a run, written as one file at every change.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / STATE
        self._values: dict[str, Any] = {}

    @property
    def begun(self) -> bool:
        """Whether anything was recorded of this run."""
        return bool(self._values)

    def update(self, write: bool, **changes: Any) -> None:
        """Add or change values.

        Args:
            write: Whether this process writes the file.
            changes: The values.
        """
        self._values |= changes
        if write:
            write_json(self.path, self._values)

    def check_free(self) -> None:
        """Refuse a folder that holds another run.

        Raises:
            FileExistsError: If it holds one.
        """
        if self.path.exists():
            raise FileExistsError(
                f"the output folder {str(self.path.parent)!r} holds another run ({STATE}); expected a new one: set "
                "--trainer.run_dir to another folder, or leave it out to have one made; --trainer.resume true resumes "
                "the run that is there"
            )
