"""Two facts about one subject in one edit batch: one shared target compared with a target for each.

    python benchmarks/equal_keys.py [--subjects 60] [--seed 0] [--apart]

Subjects of atlas-tuning whose prompt begins with the subject get a second fact: a prompt and an object of another
record of the same kind of subject. Both prompts are the same up to the subject's end, so the keys are equal. Prints how
many facts the edited model says. With `--apart` the second facts come in a second edit batch, with stream.yaml's
settings.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from pmet_lightning import Editor
from pmet_lightning.compare.plan import quiet, read_report
from pmet_lightning.data.readers import read_edits
from pmet_lightning.data.records import Edit
from pmet_lightning.evaluation.generation import says
from pmet_lightning.run.lightning_cli import run_fit

# Relations whose subjects are of one kind.
KINDS = (
    {"birthplace", "instrument", "mother-tongue", "profession", "sport"},
    {"headquarters", "industry"},
    {"maker", "material"},
)


def pairs(subjects: int, seed: int) -> list[dict[str, Any]]:
    """Records of two facts for each subject, the second of another relation."""
    edits = [edit for edit in read_edits("atlas-tuning") if edit.prompt.startswith("{}")]
    rng, found = random.Random(seed), []
    rng.shuffle(edits)
    for edit in edits:
        kind = next((kind for kind in KINDS if edit.relation in kind), set())
        others = [other for other in edits if other.relation in kind - {edit.relation}]
        if others:
            found += [record(edit, edit), record(edit, rng.choice(others))]
    return found[: 2 * subjects]


def record(subject: Edit, fact: Edit) -> dict[str, Any]:
    """The fact of one edit about the subject of another."""
    return {"prompt": fact.prompt, "subject": subject.subject, "target_new": fact.target}


def apart(records: list[dict[str, Any]], merged: bool) -> str:
    """How many of the first and of the second facts are said when both edit batches are written."""
    editor = Editor.from_config("stream.yaml", merge_equal_keys=merged, drift={"text": None, "max_perplexity": None})
    parts = records[0::2], records[1::2]
    for part in parts:
        editor.edit(part, evaluate=False)
    counts = []
    for part in parts:
        answers = editor.ask([fact["prompt"].replace("{}", fact["subject"], 1) for fact in part])
        counts.append(sum(says(answer, fact["target_new"]) for answer, fact in zip(answers, part, strict=True)))
    return f"{counts[0]} of {len(parts[0])} first facts said, {counts[1]} of {len(parts[1])} second ones"


def main() -> None:
    """Write the same records both ways."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--apart", action="store_true")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    names = {True: "one shared target", False: "a target for each"}
    if options.apart:
        for merged, name in names.items():
            sys.stdout.write(f"{name}: {apart(pairs(options.subjects, options.seed), merged)}\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.json"
        path.write_text(json.dumps(pairs(options.subjects, options.seed)))
        for merged, name in names.items():
            settings = {"data.path": str(path), "model.merge_equal_keys": merged}
            report = read_report(run_fit("pmet.yaml", quiet(settings, Path(folder) / str(merged))))
            lines, verdict = report["edits"], report["verdict"]
            low = sum(line["p_prompt_after"] < 0.5 for line in lines)
            sys.stdout.write(
                f"{name}: {verdict['said']} of {verdict['facts']} facts said, P(o*) below one half for {low}\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
