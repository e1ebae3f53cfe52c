"""The command ``harness``: an exported model handed over to lm-evaluation-harness."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pmet_lightning.utils.files import write_json
from pmet_lightning.utils.resources import check_device, locate

log = logging.getLogger(__name__)


def harness(
    model: str,
    tasks: list[str],
    out: str,
    include: str | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    device: str | None = None,
) -> None:
    """Evaluate a Hugging Face folder with lm-evaluation-harness.

    Args:
        model: The folder, such as one made by ``export``, a hub name, or the shipped 'atlas'.
        tasks: Names of tasks, groups or tags of the harness, or of the folder ``include``.
        out: The JSON file to write; must not exist.
        include: A folder with task YAMLs of one's own; a path in them is relative to where the command is run.
        limit: Most documents of each task; null takes all, and anything else is for trying out only.
        batch_size: Rows in one forward pass.
        device: Where the model runs, such as cpu or cuda:0; null takes a GPU where there is one.

    Raises:
        FileExistsError: If ``out`` is there.
        ImportError: If lm-evaluation-harness is not installed.
        FileNotFoundError: If the model or the folder ``include`` is not there.
        ValueError: If a task or the device is unknown, or a number is out of range.
    """
    if Path(out).exists():
        raise FileExistsError(f"--out {out}: expected a new file, found one; remove it or choose another name")
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"--batch_size is {batch_size} and --limit {limit}, expected at least 1")
    if include is not None and not Path(include).is_dir():
        raise FileNotFoundError(f"--include {include}: expected a folder with task YAMLs, there is none")
    lm_eval = _imported()
    device = check_device(device, "--device")
    model_args = {"pretrained": _located(model)}
    manager = lm_eval.tasks.TaskManager(include_path=include, metadata=model_args)
    _check_tasks(tasks, manager.all_tasks)
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args=model_args,
        tasks=tasks,
        task_manager=manager,
        limit=limit,
        batch_size=batch_size,
        device=device,
        log_samples=False,
    )
    if results is None:  # the harness gives results to the first process only
        return
    write_json(out, json.loads(json.dumps(results, default=_plain)))
    log.info("%s\nthe results are in %s", lm_eval.utils.make_table(results).rstrip(), out)


def _imported() -> Any:
    """The package ``lm_eval``, with all it needs to open a Hugging Face folder."""
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
        import lm_eval.utils
    except ImportError as error:
        raise ImportError(
            f'the command harness needs lm-evaluation-harness ({error}): pip install "pmet-lightning[harness]"'
        ) from error
    return lm_eval


def _located(model: str) -> str:
    """The folder or hub name, once its configuration and tokenizer could be read."""
    from pmet_lightning.data.encoder import load_tokenizer
    from pmet_lightning.model.loading import load_config

    path = Path(locate(model))
    if path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"--model {model}: the folder has no config.json, expected one that 'export' has made")
    try:
        load_config(model)
        load_tokenizer(model)
    except FileNotFoundError as error:
        raise FileNotFoundError(str(error).replace("--model.model_name", "--model")) from error
    # The harness asks the hub about whatever could be a hub name, and a relative path could be one.
    return str(path.resolve()) if path.exists() else model


def _check_tasks(tasks: Sequence[str], known: Sequence[str]) -> None:
    """Refuse names that are no task, and say which are close.

    Raises:
        ValueError: If there is no task, or an unknown one.
    """
    if not tasks:
        raise ValueError("--tasks is empty, expected at least one, such as --tasks [lambada_openai]")
    for task in (name for name in tasks if name not in known):
        close = get_close_matches(task, known, n=3)
        advice = f"did you mean {', '.join(close)}?" if close else "'lm-eval ls tasks' lists them"
        raise ValueError(
            f"--tasks: no task, group or tag {task!r} among the {len(known)} known ({advice}); tasks of your own are "
            "found with --include FOLDER"
        )


def _plain(value: Any) -> Any:
    """A value that JSON does not know as one that it does: numbers of NumPy and torch as numbers, all else as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
