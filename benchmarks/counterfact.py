"""Real COUNTERFACT records for tuning and for reporting, with no subject in both: the input of compare-gemma.yaml.

    python benchmarks/counterfact.py counterfact.json more.json --tuning 450 --out counterfact

Each subject is kept once, so that no two records contradict each other; those of the first file are all for reporting.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any

from pmet_lightning.data.readers import read_records
from pmet_lightning.utils.files import write_json


def subject_of(record: dict[str, Any]) -> str:
    """The subject by which records are told apart."""
    return str(record.get("requested_rewrite", record)["subject"]).strip().casefold()


def unique(files: list[str], seen: set[str]) -> list[dict[str, Any]]:
    """The records of some files with a subject that was not seen before."""
    found = []
    for _, _, record in read_records(files) if files else []:
        if subject_of(record) not in seen:
            seen.add(subject_of(record))
            found.append(record)
    return found


def main() -> None:
    """Split the records of some files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", help="native or flat COUNTERFACT records; the first file is for reporting")
    parser.add_argument("--tuning", type=int, default=450, help="number of tuning records, from the other files")
    parser.add_argument("--seed", type=int, default=0, help="seed of the shuffle of the other files")
    parser.add_argument("--out", default="counterfact", help="folder of tuning.json and reporting.json")
    options = parser.parse_args()
    seen: set[str] = set()
    reporting, others = unique(options.files[:1], seen), unique(options.files[1:], seen)
    random.Random(options.seed).shuffle(others)
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "tuning.json", others[: options.tuning])
    write_json(folder / "reporting.json", reporting + others[options.tuning :])
    sys.stdout.write(
        f"tuning: {len(others[: options.tuning])}, reporting: {len(reporting) + len(others[options.tuning :])}\n"
    )


if __name__ == "__main__":
    main()
