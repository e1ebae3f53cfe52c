"""SIGKILL at random moments of every command that writes: what goes on ends alike, and nothing is half-written.

``PMET_KILLS`` is the number of kills of each command.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pmet_lightning.cli.dispatch import main
from pmet_lightning.model.patch import read_patch
from pmet_lightning.run.patch_file import PATCH
from tests.harness import without_digest
from tests.tiny import RECORDS, save_tiny

KILLS = int(os.environ.get("PMET_KILLS", "2"))
PROCESSES = multiprocessing.get_context("forkserver")  # imports take longer than the work: one process makes them


# What commands that write one file or folder make, in the folder of a test.
RESULTS = {"export": "model", "adapter": "adapter", "moments export": "moments.safetensors"}


def arguments_of(command: str, base: Path, out: Path) -> list[str]:
    if command in ("export", "adapter"):
        kind = "transformers" if command == "export" else "peft"
        return ["export", "--run", str(base / "fit"), "--out", str(out / RESULTS[command]), "--format", kind]
    if command == "remove":  # over the old file
        return ["patch", "remove", "--patch", str(out), "--out", str(out), "--facts", "0", "--moments_folder",
                str(base / "moments")]  # fmt: skip
    if command == "moments export":
        return ["moments", "export", "--out", str(out / RESULTS[command]), "--folder", str(base / "moments")]
    if command == "moments import":
        return ["moments", "import", "--file", str(base / "moments.safetensors"), "--folder", str(out)]
    moments = out if command == "stats" else base / "moments"
    given = [
        "stats" if command == "stats" else "fit", "--config", "pmet.yaml", "--trainer.run_dir", str(out),
        "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--model.model_name",
        str(base / "model"), "--model.layers", "[1, 2]", "--model.dtype", "float64", "--moments.corpus",
        str(base / "corpus.txt"), "--moments.folder", str(moments),
    ]  # fmt: skip
    if command == "stats":
        return [*given, "--moments.save_every", "0.05", "--moments.samples", "3000"]
    return [
        *given, "--model.steps", "4", "--data.path", str(base / "records.jsonl"), "--data.edit_batch", "2",
        "--data.stream", str(command == "stream").lower(), "--spread.lam", "2", "--spread.protect_past", "true",
        "--drift.text", "null", "--trainer.resume", "true",
    ]  # fmt: skip


def work(command: str, base: Path, out: Path, is_ready) -> None:
    """A command, in a process of its own."""
    torch.set_num_threads(1)
    is_ready.set()
    main(arguments_of(command, base, out))


def has_ended(command: str, out: Path) -> bool:
    """Whether a command that cannot be run again has done all of its work: its process may be killed after that."""
    if command == "remove":
        return "0" not in [fact["case_id"] for fact in read_patch(out / PATCH).manifest["facts"]]
    return command in RESULTS and (out / RESULTS[command]).exists()


def run(command: str, base: Path, out: Path, seconds: float | None = None) -> bool:
    """Whether a command ended before it was killed."""
    if command == "remove" and not out.exists():
        out.mkdir()
        shutil.copytree(base / "fit", out, dirs_exist_ok=True)
    if has_ended(command, out):
        return True
    is_ready = PROCESSES.Event()
    process = PROCESSES.Process(target=work, args=(command, base, out, is_ready))
    process.start()
    assert is_ready.wait(300)
    process.join(300 if seconds is None else seconds)
    if process.exitcode is None:
        assert seconds is not None, f"{command} hangs"
        process.kill()
        process.join()
        return False
    assert process.exitcode == 0, command
    return True


def is_replaced(path: Path) -> bool:
    """Whether a file holds protected keys of a patch that is no longer there: the next write deletes it."""
    patch = path.with_name(PATCH)
    return "-past-" in path.name and patch.is_file() and read_patch(patch).manifest["past_keys"][:12] not in path.name


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's files, which must be whole; JSON files must be, too."""
    found = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if any(part.startswith(".") for part in inside.parts) or "unfinished" in str(inside):
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        if path.suffix == ".safetensors" and not is_replaced(path):
            file = without_digest(inside.name)  # that of the bits, which another order of a sum may change
            found |= {f"{file}: {name}": tensor for name, tensor in load_file(path).items()}
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_tiny("gpt2", folder / "model")
    (folder / "records.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in RECORDS))
    texts = [f"This is the text of number {i}, and it is short but not the shortest." for i in range(3000)]
    (folder / "corpus.txt").write_text("\n".join(texts))
    PROCESSES.set_forkserver_preload([__name__, "pmet_lightning.run.lightning_cli", "pmet_lightning.run.trainer"])
    run("fit", folder, folder / "fit")
    main(["moments", "export", "--out", str(folder / "moments.safetensors"), "--folder", str(folder / "moments")])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", ["fit", "stream", "stats", "export", "adapter", "remove", "moments export", "moments import"]
)
def test_a_killed_command_goes_on_and_ends_alike(base, tmp_path, command):
    start = time.monotonic()
    assert run(command, base, tmp_path / "whole")
    longest, expected = time.monotonic() - start, tensors(tmp_path / "whole")
    assert expected
    rng, kills, number = random.Random(command), 0, 0
    while kills < KILLS:
        out, number = tmp_path / str(number), number + 1
        assert number < 20 * KILLS
        while kills < KILLS and not run(command, base, out, rng.uniform(0, longest)):
            kills += 1
            tensors(out)
        assert run(command, base, out)
        found = tensors(out)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():  # a run that goes on adds the same numbers in another order
            assert float((found[name] - tensor).norm()) <= 1e-9 * float(tensor.norm()), name
        assert not list(out.rglob(".*.tmp"))
        assert not list(out.rglob("unfinished*"))
        if command in ("fit", "stream"):
            assert json.loads((out / "state.json").read_text())["status"] == "finished"
            lines = [json.loads(line)["case_id"] for line in (out / "ledger.jsonl").read_text().splitlines()]
            assert lines == [str(i) for i in range(len(RECORDS))]
            assert len(list(out.glob("patch-past-*"))) == 1
