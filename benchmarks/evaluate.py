"""Evaluation in batches against one record at a time: same records, same model, same results.

    python benchmarks/evaluate.py [--limit 50] [--repeat 5] [--model FOLDER --records FILE] [--tokens 8192] [--batch 50]

"One record at a time" is what other editors do: every prompt with an answer is a forward pass of its own with the
logits of all positions, every free answer a call of ``generate`` of its own. It is written here from the formulas, with
transformers alone, and both must give the same scores before anything is timed.
"""

from __future__ import annotations

import argparse
import math
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

from pmet_lightning.data.encoder import PromptEncoder, load_tokenizer
from pmet_lightning.data.readers import read_edits
from pmet_lightning.data.records import Probe
from pmet_lightning.evaluation.answer_scores import score_answers
from pmet_lightning.evaluation.probes import ProbeResult, score_probes
from pmet_lightning.model.loading import load_model

NEW_TOKENS = 16  # as in a run with shipped settings, and so are the defaults of --tokens and --batch
FREE_KINDS = ("efficacy", "generalisation", "portability", "multihop")
TOLERANCE = 1e-4
Results = list[list[ProbeResult]]


def batched(model: Any, tokenizer: Any, records: Sequence[Sequence[Probe]], tokens: int, batch: int) -> Results:
    """Scores as a run computes them."""
    encoder, results = PromptEncoder(tokenizer), []
    for start in range(0, len(records), batch):
        some = records[start : start + batch]
        results += score_probes(model, encoder, some, tokens, model.device, NEW_TOKENS)
    return results


def one_at_a_time(model: Any, tokenizer: Any, records: Sequence[Sequence[Probe]]) -> Results:
    """Scores of every question of every record, one by one."""
    return [[one_question(model, tokenizer, probe) for probe in record] for record in records]


@torch.no_grad()
def one_question(model: Any, tokenizer: Any, probe: Probe) -> ProbeResult:
    """Success and magnitude by NLL(o | p) = -(1/|o|) Σ_j log P(o_j | p, o_<j), and the free answer."""
    scored = [teacher_forced(model, tokenizer, probe.prompt, answer) for answer in probe.answers]
    nll, accuracy = min(nll for nll, _ in scored), max(accuracy for _, accuracy in scored)
    success, magnitude = accuracy, math.exp(-nll)
    if probe.rival is not None:
        rival_nll, _ = teacher_forced(model, tokenizer, probe.prompt, probe.rival)
        success, magnitude = float(nll < rival_nll), magnitude - math.exp(-rival_nll)
    if probe.kind not in FREE_KINDS:
        return ProbeResult(probe.kind, success, magnitude)
    text = free_text(model, tokenizer, probe.prompt)
    exact = any(words(first_sentence(text)) == words(answer) for answer in probe.answers)
    contains = any(f" {' '.join(words(answer))} " in f" {' '.join(words(text))} " for answer in probe.answers)
    return ProbeResult(probe.kind, success, magnitude, float(exact), float(contains))


def teacher_forced(model: Any, tokenizer: Any, prompt: str, answer: str) -> tuple[float, float]:
    """NLL of an answer after a prompt, and the share of its tokens that are the argmax."""
    whole = tokenizer(f"{prompt} {answer.lstrip()}", return_tensors="pt").input_ids.to(model.device)
    first = len(tokenizer(prompt).input_ids)
    logits = model(whole).logits[0, first - 1 : -1].float()
    labels = whole[0, first:]
    log_p = logits.log_softmax(dim=-1)[torch.arange(len(labels)), labels]
    return -log_p.mean().item(), (logits.argmax(dim=-1) == labels).float().mean().item()


def free_text(model: Any, tokenizer: Any, prompt: str) -> str:
    """Greedy continuation of a prompt."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    generated = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id or 0
    )
    return str(tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def first_sentence(text: str) -> str:
    """The text up to a line break or the end of a sentence."""
    text = text.strip().split("\n")[0]
    ends = [i + 1 for i, c in enumerate(text) if c in ".!?" and text[i + 1 : i + 2] in ("", " ")]
    return text[: ends[0]] if ends else text


def words(text: str) -> list[str]:
    """Words in lower case, without punctuation and articles."""
    plain = "".join(" " if c in string.punctuation else c for c in text.casefold())
    return [word for word in plain.split() if word not in ("a", "an", "the")]


def check(found: Results, plain: Results) -> str:
    """Describe how well both results agree.

    Raises:
        AssertionError: If a success or a magnitude differs; free answers may differ if two tokens are equally likely.
    """
    pairs = [pair for a, b in zip(found, plain, strict=True) for pair in zip(a, b, strict=True)]
    successes = sum(abs(a.success - b.success) > TOLERANCE for a, b in pairs)
    magnitude = max(abs(a.magnitude - b.magnitude) for a, b in pairs)
    asked = [(a, b) for a, b in pairs if b.exact is not None]
    free = sum((a.exact, a.contains) != (b.exact, b.contains) for a, b in asked)
    text = f"{successes} of {len(pairs)} successes and {free} of {len(asked)} free answers differ, magnitudes by "
    text += f"{magnitude:.1e} at most"
    if successes or not magnitude <= TOLERANCE:
        raise AssertionError(f"not the same results, so nothing to time: {text}")
    return text


def compare(name: str, path: str, options: argparse.Namespace) -> None:
    """Check one model and set of records, and time both ways alternately."""
    model, tokenizer = load_model(name), load_tokenizer(name)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    records = [edit.probes for edit in read_edits(path, limit=options.limit)]
    ways: dict[str, Callable[[], Results]] = {
        "batched": lambda: batched(model, tokenizer, records, options.tokens, options.batch),
        "one at a time": lambda: one_at_a_time(model, tokenizer, records),
    }
    agreement = check(*(evaluate() for evaluate in ways.values()))
    # Before an edit few free answers are correct, so their scores say little about the texts, which are compared too.
    asked = [probe.prompt for record in records for probe in record if probe.kind in FREE_KINDS]
    encoder, device = PromptEncoder(tokenizer), model.device
    _, generated = score_answers(model, encoder.encode_all(asked), encoder.pad_id, options.tokens, device, NEW_TOKENS)
    other = sum(free_text(model, tokenizer, prompt) != encoder.decode(generated[i]) for i, prompt in enumerate(asked))
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(options.repeat):
        for way, evaluate in ways.items():
            start = time.perf_counter()
            evaluate()
            seconds[way].append((time.perf_counter() - start) / len(records))
    out = sys.stdout.write
    questions = sum(map(len, records))
    out(f"\n{name}, {len(records)} records of {path}, {questions} questions: {agreement}, ")
    out(f"{other} of {len(asked)} free texts differ\n")
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    for way, times in seconds.items():
        spread = f"{min(times):.4f} to {max(times):.4f}, median of {options.repeat}"
        out(f"{way}: {medians[way]:.4f} s a record ({spread})\n")
    out(f"ratio of the medians {medians['one at a time'] / medians['batched']:.1f}\n")
    sys.stdout.flush()


def main() -> None:
    """Compare on Atlas and, if one is given, on another model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=8192, help="most tokens in one batch (model.tokens_per_batch)")
    parser.add_argument("--batch", type=int, default=50, help="records in one batch (data.evaluation_batch)")
    parser.add_argument("--model", help="a second model, with --records")
    parser.add_argument("--records", help="a file of records for it")
    options = parser.parse_args()
    if (options.model is None) != (options.records is None):
        parser.error("--model and --records go together")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sys.stdout.write(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}\n"
    )
    compare("atlas", "atlas-records", options)
    if options.model is not None:
        compare(options.model, options.records, options)


if __name__ == "__main__":
    main()
