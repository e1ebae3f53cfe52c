"""Evaluation in batches against one record at a time: same records, same model, same results.

    python benchmarks/evaluate.py [--limit 50] [--repeat 5] [--model FOLDER --records FILE]

"One record at a time" is what other editors do: every prompt with an answer is a forward pass of its own with the
logits of all positions, every free answer a call of ``generate`` of its own. It is written here from the formulas, with
transformers alone, and both must give the same scores before anything is timed.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import statistics
import string
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers

from pmet_lightning.edits.readers import read_edits
from pmet_lightning.edits.records import Probe
from pmet_lightning.language_model import load_model, load_tokenizer
from pmet_lightning.metrics import ProbeResult, score_probes
from pmet_lightning.tokens import PromptEncoder

RECORDS_AT_ONCE, TOKENS_PER_BATCH, NEW_TOKENS = 32, 8192, 16  # as in a run with shipped settings
FREE_KINDS = ("efficacy", "generalisation", "portability", "multihop")
TOLERANCE = 1e-4
Results = list[list[ProbeResult]]


def batched(model: Any, tokenizer: Any, records: Sequence[Sequence[Probe]]) -> Results:
    """As a run does it."""
    encoder, results = PromptEncoder(tokenizer), []
    for start in range(0, len(records), RECORDS_AT_ONCE):
        some = records[start : start + RECORDS_AT_ONCE]
        results += score_probes(model, encoder, some, TOKENS_PER_BATCH, model.device, NEW_TOKENS)
    return results


def one_at_a_time(model: Any, tokenizer: Any, records: Sequence[Sequence[Probe]]) -> Results:
    """Every question of every record by itself."""
    return [[one_question(model, tokenizer, probe) for probe in record] for record in records]


@torch.no_grad()
def one_question(model: Any, tokenizer: Any, probe: Probe) -> ProbeResult:
    """Success and magnitude by NLL(o | p) = -(1/|o|) Σ_j log P(o_j | p, o_<j), and the free answer."""
    scored = [teacher_forced(model, tokenizer, probe.prompt, answer) for answer in probe.answers]
    nll, accuracy = min(nll for nll, _ in scored), max(accuracy for _, accuracy in scored)
    success, magnitude = accuracy, torch.tensor(-nll).exp().item()
    if probe.rival is not None:
        rival_nll, _ = teacher_forced(model, tokenizer, probe.prompt, probe.rival)
        success, magnitude = float(nll < rival_nll), magnitude - torch.tensor(-rival_nll).exp().item()
    if probe.kind not in FREE_KINDS:
        return ProbeResult(probe.kind, success, magnitude)
    given = tokenizer(probe.prompt, return_tensors="pt").to(model.device)
    said = model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id or 0)
    text = tokenizer.decode(said[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
    exact = any(words(first_sentence(text)) == words(answer) for answer in probe.answers)
    contains = any(f" {' '.join(words(answer))} " in f" {' '.join(words(text))} " for answer in probe.answers)
    return ProbeResult(probe.kind, success, magnitude, float(exact), float(contains))


def teacher_forced(model: Any, tokenizer: Any, prompt: str, answer: str) -> tuple[float, float]:
    """NLL of an answer behind a prompt, and the share of its tokens that are the argmax."""
    whole = tokenizer(f"{prompt} {answer.lstrip()}", return_tensors="pt").input_ids.to(model.device)
    first = len(tokenizer(prompt).input_ids)
    logits = model(whole).logits[0, first - 1 : -1].float()
    labels = whole[0, first:]
    log_p = logits.log_softmax(dim=-1)[torch.arange(len(labels)), labels]
    return -log_p.mean().item(), (logits.argmax(dim=-1) == labels).float().mean().item()


def first_sentence(text: str) -> str:
    """Up to a line break or the end of a sentence."""
    text = text.strip().split("\n")[0]
    ends = [i + 1 for i, c in enumerate(text) if c in ".!?" and text[i + 1 : i + 2] in ("", " ")]
    return text[: ends[0]] if ends else text


def words(text: str) -> list[str]:
    """Words in lower case, without punctuation and articles."""
    plain = "".join(" " if c in string.punctuation else c for c in text.casefold())
    return [word for word in plain.split() if word not in ("a", "an", "the")]


def check(found: Results, plain: Results) -> str:
    """Say how well both agree.

    Raises:
        AssertionError: If a success or a magnitude differs; free answers may, where two tokens are equally likely.
    """
    pairs = [pair for a, b in zip(found, plain, strict=True) for pair in zip(a, b, strict=True)]
    successes = sum(abs(a.success - b.success) > TOLERANCE for a, b in pairs)
    magnitude = max(abs(a.magnitude - b.magnitude) for a, b in pairs)
    asked = [(a, b) for a, b in pairs if b.exact is not None]
    free = sum((a.exact, a.contains) != (b.exact, b.contains) for a, b in asked)
    text = f"{successes} of {len(pairs)} successes and {free} of {len(asked)} free answers differ, magnitudes by "
    text += f"{magnitude:.1e} at most"
    assert successes == 0, text
    assert magnitude <= TOLERANCE, text
    return text


def compare(name: str, path: str, limit: int, repeat: int) -> None:
    """Check one model and set of records, and time both in turn."""
    model, tokenizer = load_model(name), load_tokenizer(name)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    records = [edit.probes for edit in read_edits(path, limit=limit)]
    ways: dict[str, Callable[[Any, Any, Sequence[Sequence[Probe]]], Results]] = {
        "batched": batched,
        "one at a time": one_at_a_time,
    }
    agreement = check(*(way(model, tokenizer, records) for way in ways.values()))
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeat):
        for way, evaluate in ways.items():
            start = time.perf_counter()
            evaluate(model, tokenizer, records)
            seconds[way].append((time.perf_counter() - start) / len(records))
    out = sys.stdout.write
    questions = sum(map(len, records))
    out(f"\n{name}, {len(records)} records of {path}, {questions} questions: {agreement}\n")
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    for way, times in seconds.items():
        out(f"{way}: {medians[way]:.4f} s a record ({min(times):.4f} to {max(times):.4f}, median of {repeat})\n")
    out(f"ratio of the medians {medians['one at a time'] / medians['batched']:.1f}\n")
    sys.stdout.flush()


def main() -> None:
    """Compare on Atlas, and on a model of one's own where one is given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--model", help="a second model, with --records")
    parser.add_argument("--records", help="a file of records for it")
    options = parser.parse_args()
    if (options.model is None) != (options.records is None):
        parser.error("--model and --records go together")
    # transformers says of every call of generate that a given pad token is a given pad token
    logging.getLogger("transformers").setLevel(logging.ERROR)
    sys.stdout.write(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}\n"
    )
    compare("atlas", "atlas-records", options.limit, options.repeat)
    if options.model is not None:
        compare(options.model, options.records, options.limit, options.repeat)


if __name__ == "__main__":
    main()
