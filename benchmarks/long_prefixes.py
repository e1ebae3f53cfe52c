"""Facts asked behind 50 tokens of unrelated text: which contexts at the time of the edit meet them.

    python benchmarks/long_prefixes.py [--edits 200] [--tokens 50] [--seed 0]

200 records of `atlas-tuning` are written into the bundled model, as `--spread.targets` spread and replay do it, with
contexts of several numbers and lengths. Their edit prompts and paraphrases are then asked again with text of
`atlas-corpus` in front, of other subjects. Prints the Score, and efficacy and generalization with and without it.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pmet_lightning import Edit, Editor
from pmet_lightning.data.corpus import corpus_texts
from pmet_lightning.data.readers import read_edits

CONTEXTS = ((0, 0), (3, 6), (10, 6), (3, 20), (3, 50), (10, 20))  # number and tokens of each
WAYS: dict[str, dict[str, Any]] = {
    "spread": {},
    "replay": {"optimize": "ffn", "clamp": 1.0, "spread": {"targets": "replay"}},
}


def prefixes(tokenizer: Any, tokens: int, avoided: set[str], rng: random.Random) -> list[str]:
    """Texts of so many tokens, without some names."""
    found = []
    for text in corpus_texts("atlas-corpus"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) >= tokens and not any(name in text for name in avoided):
            found.append(tokenizer.decode(ids[:tokens]).rpartition(".")[0] + ". ")
    rng.shuffle(found)
    return found


def with_prefixes(edits: Sequence[Edit], texts: Sequence[str], rng: random.Random) -> list[Edit]:
    """The same edits with all questions but those about neighbors behind a text."""
    return [
        replace(
            edit,
            probes=tuple(
                replace(probe, prompt=rng.choice(texts) + probe.prompt)
                for probe in edit.probes
                if probe.kind in ("efficacy", "generalisation")
            ),
            generation_prompts=(),
        )
        for edit in edits
    ]


def main() -> None:
    """Print a row for each way and each choice of contexts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    edits, rng, asked = read_edits("atlas-tuning")[: given.edits], random.Random(given.seed), None
    for way, settings in WAYS.items():
        for count, length in CONTEXTS:
            contexts: dict[str, Any] = (
                {"contexts": []} if not count else {"context_count": count, "context_length": length}
            )
            editor = Editor.from_config(
                "pmet.yaml", drift={"text": None}, device="cpu", free_tokens=0, seed=given.seed, **settings, **contexts
            )
            if asked is None:
                texts = prefixes(editor.tokenizer, given.tokens, {edit.subject for edit in edits}, rng)
                asked = with_prefixes(edits, texts, rng)
            plain, behind = dict(editor.edit(edits).scores["after"]), editor.evaluate(asked)
            sys.stdout.write(
                f"{way}, {count} contexts of {length} tokens: Score {plain['score']:.1f}; efficacy "
                f"{plain['efficacy']:.1f}, behind {given.tokens} tokens {behind['efficacy']:.1f}; generalization "
                f"{plain['generalisation']:.1f}, behind them {behind['generalisation']:.1f}; specificity "
                f"{plain['specificity']:.1f}\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
