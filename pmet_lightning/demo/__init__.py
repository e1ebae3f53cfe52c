"""Atlas, the bundled world: records to edit, a corpus, and a small language model that knows its facts."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from pmet_lightning.utils.files import new_folder

log = logging.getLogger(__name__)

# Settings are chosen on one part of the records and reported on another.
PARTS = {"tuning": slice(0, 400), "records": slice(400, 600), "spare": slice(600, None)}


def demo(
    out: str,
    seed: int = 0,
    edits: int | None = None,
    architecture: str = "gptj",
    epochs: int | None = None,
    precision: str = "32-true",
) -> None:
    """Rebuild the Atlas world and its model from a seed.

    Atlas is a made-up world of persons, cities, companies and products. The result is what the package ships
    in `pmet_lightning/demo/atlas`: edits in COUNTERFACT's format (`tuning.json`, on which settings are chosen,
    `records.json`, on which they are evaluated, and `spare.json`), `corpus.txt` (plain text for the second moments
    of the keys) and `model` (a Hugging Face folder). Takes about ten minutes on two CPU cores.

    Args:
        out: Folder to write; must be new or empty.
        seed: Seed of the world, of the records and of the training; equal seeds give equal files up to the
            rounding of the machine.
        edits: About how many records the world has; by default 840, as in the shipped one.
        architecture: Architecture of the language model: gptj (parallel blocks), gpt2 or llama (sequential).
        epochs: How often each sentence is read in training; by default as often as the architecture needs to learn
            Atlas.
        precision: Lightning's precision of the training, e.g. bf16-mixed if the processor is fast at it.

    Raises:
        ValueError: If the architecture is not known.
        FileExistsError: If `out` is not empty.
    """
    from pmet_lightning.demo.training import ARCHITECTURES, EPOCHS  # seconds of imports

    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"--architecture: expected one of {known}, got {architecture}")
    with new_folder(out, "--out") as unfinished:
        _write(unfinished, seed, edits, architecture, epochs or EPOCHS[architecture], precision)
    log.info("Atlas is in %s", out)


def _write(folder: Path, seed: int, edits: int | None, architecture: str, epochs: int, precision: str) -> None:
    from pmet_lightning.demo.records import records
    from pmet_lightning.demo.training import train
    from pmet_lightning.demo.world import EDITS, build_world, corpus_text

    world = build_world(seed, edits or EDITS)
    all_records = records(world, seed)
    for name, part in PARTS.items():
        text = json.dumps(all_records[part], separators=(",", ":"))
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    (folder / "corpus.txt").write_text(corpus_text(world, seed), encoding="utf-8")
    train(world, folder / "model", seed, architecture=architecture, epochs=epochs, precision=precision)
