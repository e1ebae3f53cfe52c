"""The command ``harness``: evaluates an exported model with lm-evaluation-harness."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pmet_lightning.utils.files import check_new_file, write_json
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
    trust_remote_code: bool = False,
) -> None:
    """Evaluate a Hugging Face folder with lm-evaluation-harness.

    Args:
        model: A Hugging Face folder, such as one made by ``export``, a hub name, or the shipped 'atlas'.
        tasks: Names of tasks, groups or tags of the harness, or of the folder ``include``.
        out: The JSON file to write; must not exist.
        include: A folder with your own task YAMLs; a relative path in them is relative to the working directory.
        limit: Number of documents of each task that are used; null uses all, anything else is for trial runs only.
        batch_size: Rows in one forward pass.
        device: Where the model runs, such as cpu or cuda:0; null uses a GPU if there is one.
        trust_remote_code: Whether Python code in the model's folder or repository may run.

    Raises:
        FileExistsError: If ``out`` exists.
        ImportError: If lm-evaluation-harness is not installed.
        FileNotFoundError: If the model or the folder ``include`` does not exist.
        ValueError: If a task or the device is unknown, or a number is out of range.
    """
    check_new_file(out, "--out")
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"--batch_size is {batch_size} and --limit {limit}, expected at least 1")
    include = None if include is None else str(Path(include).expanduser())
    if include is not None and not Path(include).is_dir():
        raise FileNotFoundError(f"--include {include}: expected a folder with task YAMLs, found none")
    lm_eval = _import_lm_eval()
    device = check_device(device, "--device")
    model_args: dict[str, Any] = {"pretrained": _locate_model(model, trust_remote_code)}
    if trust_remote_code:
        model_args["trust_remote_code"] = True
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
    if results is None:  # the harness returns results to the first process only
        return
    write_json(out, json.loads(json.dumps(results, default=_to_json)))
    log.info("%s\nthe results are in %s", lm_eval.utils.make_table(results).rstrip(), out)


def _import_lm_eval() -> Any:
    """Import the package ``lm_eval`` with the modules needed to open a Hugging Face folder."""
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


def _locate_model(model: str, trust_remote_code: bool) -> str:
    """The folder or hub name of a model, after checking that its configuration and tokenizer can be read."""
    from pmet_lightning.data.encoder import load_tokenizer
    from pmet_lightning.model.loading import load_config

    path = Path(locate(model))
    if path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"--model {model}: the folder has no config.json, expected one made by 'export'")
    try:
        load_config(model, trust_remote_code)
        load_tokenizer(model, trust_remote_code)
    except FileNotFoundError as error:
        raise FileNotFoundError(str(error).replace("--model.model_name", "--model")) from error
    # The harness queries the hub for anything that could be a hub name, such as a relative path.
    return str(path.resolve()) if path.exists() else model


def _check_tasks(tasks: Sequence[str], known: Sequence[str]) -> None:
    """Reject unknown task names, and suggest similar ones.

    Raises:
        ValueError: If there is no task, or a task is unknown.
    """
    if not tasks:
        raise ValueError("--tasks is empty, expected at least one, such as --tasks [lambada_openai]")
    for task in (name for name in tasks if name not in known):
        close = get_close_matches(task, known, n=3)
        advice = f"did you mean {', '.join(close)}?" if close else "'lm-eval ls tasks' lists them"
        raise ValueError(
            f"--tasks: no task, group or tag {task!r} among the {len(known)} known ({advice}); add tasks of "
            "your own with --include FOLDER"
        )


def _to_json(value: Any) -> Any:
    """Convert a value for JSON: numbers and arrays of NumPy and torch to numbers and lists, anything else to text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
