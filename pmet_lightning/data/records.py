"""One edit, whatever file it came from, and the checks that every edit must pass before any work starts."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pmet_lightning.data.fields import (
    RecordError,
    check_no_faults,
    checked_texts,
    format_of,
    is_missing,
    items,
    name_in,
    optional_text,
    text,
    texts,
)

# Scripts without spaces between words (Thai, Lao, Burmese, Khmer, kana, Han); and Hangul, where particles follow.
_SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
_FORMS: tuple[Literal["NFC", "NFD"], ...] = ("NFC", "NFD")
ZsreTarget = Literal["answers", "alt"]
_QUESTIONS = (("prompt", "ground_truth"), ("loc", "loc_ans"))  # in KnowEdit and in QAEdit
ProbeKind = Literal["efficacy", "generalisation", "specificity", "portability", "multihop"]


@dataclass(frozen=True)
class Probe:
    """One question asked before and after the edit.

    Attributes:
        kind: Which metric it belongs to.
        prompt: Complete text.
        answer: The answer that counts as success.
        rival: The answer that it must be more probable than; without a rival, the share of the answer's tokens that
            are the argmax counts (docs/evaluation.md: COUNTERFACT and zsRE).
        aliases: Other accepted forms of the answer.
    """

    kind: ProbeKind
    prompt: str
    answer: str
    rival: str | None = None
    aliases: tuple[str, ...] = ()

    @property
    def answers(self) -> tuple[str, ...]:
        """The answer and its aliases."""
        return (self.answer, *self.aliases)


@dataclass(frozen=True)
class Edit:
    """A fact to write: (subject s, prompt with one ``{}``, target o*), and how to evaluate it.

    Attributes:
        case_id: The record's own number, or its position.
        prompt: Template with exactly one ``{}``.
        subject: What replaces the ``{}``.
        target: The new object o*.
        target_true: The old object o_c, if the record names it.
        relation: The kind of fact, if the record says so.
        target_id: The record's own identifier of o*.
        probes: Questions for the evaluation.
        generation_prompts: Beginnings of texts about the subject, for fluency and consistency.
        origin: File and record, for messages.
    """

    case_id: str
    prompt: str
    subject: str
    target: str
    target_true: str | None = None
    relation: str | None = None
    target_id: str | None = None
    probes: tuple[Probe, ...] = field(default=(), repr=False)
    generation_prompts: tuple[str, ...] = field(default=(), repr=False)
    origin: str = field(default="", repr=False)

    @property
    def question(self) -> str:
        """The bare prompt with its subject filled in."""
        return self.prompt.replace("{}", self.subject, 1)

    def evaluation_texts(self) -> list[str]:
        """All texts of its questions and answers, and its generation prompts."""
        asked = [text for probe in self.probes for text in (probe.prompt, *probe.answers, probe.rival or "")]
        return [*asked, *self.generation_prompts]

    def identity(self) -> str:
        """Hash of what the target vector depends on."""
        text = json.dumps([self.prompt, self.subject, self.target], ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def parse_records(record: Any, number: int, origin: str, zsre_target: ZsreTarget = "answers") -> list[Edit]:
    """Read one record of any known format; a record of MQuAKE may hold several edits.

    Args:
        record: As for :func:`parse_record`, or MQuAKE's form (``requested_rewrite`` is a list, ``questions`` are asked
            about all of it).
        number: Position in the file, from 0.
        origin: File and record, for messages.
        zsre_target: As for :func:`parse_record`.

    Raises:
        RecordError: If a field is missing or unusable.
    """
    if not isinstance(record, Mapping) or format_of(record) != "MQuAKE":
        return [parse_record(record, number, origin, zsre_target)]
    rewrites = record["requested_rewrite"]
    case_id = _case_id(record, number, origin)
    edits = []
    for i, rewrite in enumerate(rewrites):
        part = {"case_id": f"{case_id}-{i}" if len(rewrites) > 1 else case_id, "requested_rewrite": rewrite}
        edits.append(parse_record(part, number, f"{origin}, rewrite {i}"))
    if not edits:
        raise RecordError(f"{origin}: 'requested_rewrite' is empty, expected at least one rewrite")
    answer, questions = optional_text(record, "new_answer", origin), texts(record, "questions", origin)
    if questions and answer is None:
        raise _unanswered("questions", len(questions), "new_answer", 0, origin)
    if answer is not None:
        aliases = tuple(texts(record, "new_answer_alias", origin))
        hops = [Probe("multihop", question, answer, aliases=aliases) for question in questions]
        edits[-1] = replace(edits[-1], probes=(*edits[-1].probes, *hops))
    return edits


def parse_record(record: Any, number: int, origin: str, zsre_target: ZsreTarget = "answers") -> Edit:
    """Read one record of a format with one edit.

    Args:
        record: A mapping in COUNTERFACT's native form (``requested_rewrite``), zsRE's (``src``) or the flat
            form (``prompt``, ``subject``, ``target_new``). An error in its place is raised.
        number: Position in the file, from 0.
        origin: File and record, for messages.
        zsre_target: The new object of a zsRE record: the first of ``answers``, or ``alt``.

    Raises:
        RecordError: If a field is missing or unusable.
    """
    if isinstance(record, RecordError):
        raise record
    if not isinstance(record, Mapping):
        raise RecordError(f"{origin}: expected an object with named fields, got {type(record).__name__}")
    fields = {name: value for name, value in record.items() if not is_missing(value)}
    kind = format_of(fields)
    if kind == "zsRE":
        return _from_zsre(fields, number, origin, zsre_target)
    return _from_flat(fields, number, origin) if kind == "flat" else _from_counterfact(fields, number, origin)


def _case_id(fields: Mapping[str, Any], number: int, origin: str) -> str:
    return name_in(fields, "case_id", origin) or name_in(fields, "id", origin) or str(number)


def _first_of(fields: Mapping[str, Any], *names: str) -> str:
    """The first of these names that a record has as a field; the first one if it has none."""
    return next((name for name in names if name in fields), names[0])


def _from_counterfact(fields: Mapping[str, Any], number: int, origin: str) -> Edit:
    rewrite = fields["requested_rewrite"]
    if not isinstance(rewrite, Mapping):
        raise RecordError(f"{origin}: 'requested_rewrite' is {type(rewrite).__name__}, expected an object")
    target, old = text(rewrite, "target_new", origin), optional_text(rewrite, "target_true", origin)
    subject = text(rewrite, "subject", origin)
    prompt = template_of(text(rewrite, "prompt", origin), subject, origin)
    probes = _rewrite_probes(prompt, subject, target, old, texts(fields, "paraphrase_prompts", origin))
    neighbors = [_finished(q, "neighborhood_prompts", origin) for q in texts(fields, "neighborhood_prompts", origin)]
    if neighbors and old is None:
        raise _unanswered("neighborhood_prompts", len(neighbors), "target_true", 0, origin)
    rival = None if old == target else target
    probes += [Probe("specificity", question, str(old), rival) for question in neighbors]
    return Edit(
        _case_id(fields, number, origin),
        prompt,
        subject,
        target,
        old,
        relation=name_in(rewrite, "relation_id", origin),
        target_id=name_in(rewrite["target_new"], "id", origin),
        probes=tuple(probes),
        generation_prompts=tuple(texts(fields, "generation_prompts", origin)),
        origin=origin,
    )


def _from_zsre(fields: Mapping[str, Any], number: int, origin: str, zsre_target: ZsreTarget) -> Edit:
    target, old = _zsre_objects(fields, origin, zsre_target)
    subject = text(fields, "subject", origin)
    prompt = template_of(text(fields, "src", origin), subject, origin)
    # No rival: zsRE counts tokens of the answer, whichever of the two it is, and so do the published tables.
    probes = _rewrite_probes(prompt, subject, target, None, texts(fields, "rephrase", origin))
    for question, answer in _answered(fields, "loc", "loc_ans", origin):
        probes.append(Probe("specificity", question if question.endswith("?") else question + "?", answer))
    return Edit(_case_id(fields, number, origin), prompt, subject, target, old, probes=tuple(probes), origin=origin)


def _zsre_objects(fields: Mapping[str, Any], origin: str, zsre_target: ZsreTarget) -> tuple[str, str | None]:
    """The new object and, if that is the counterfactual one, the true one as the old object.

    ``pred`` is no old object: it is what another model had answered, often neither of the two.
    """
    answers = fields.get("answers")
    if zsre_target == "alt" and "alt" not in fields:
        raise RecordError(f"{origin}: no field 'alt', which zsre_target names; add it, or take zsre_target answers")
    if zsre_target == "alt" and not answers:
        return text(fields, "alt", origin), None
    if not isinstance(answers, list) or not answers:
        other = "; with zsre_target alt, the field 'alt' is taken" if "alt" in fields else ""
        raise RecordError(f"{origin}: 'answers' is {answers!r}, expected a list whose first entry is the target{other}")
    true = text({"answers[0]": answers[0]}, "answers[0]", origin)
    return (text(fields, "alt", origin), true) if zsre_target == "alt" else (true, None)


def _from_flat(fields: Mapping[str, Any], number: int, origin: str) -> Edit:
    """A record of fields with names of EasyEdit and LocFT, KnowEdit, QAEdit or WikiBigEdit."""
    subject = text(fields, "subject", origin)
    prompt = template_of(text(fields, _first_of(fields, "prompt", "update"), origin), subject, origin)
    target = text(fields, _first_of(fields, "target_new", "target", "ans"), origin)
    old = optional_text(fields, _first_of(fields, "ground_truth", "target_true"), origin)
    paraphrases = [*texts(fields, "rephrase_prompt", origin), *texts(fields, "rephrase", origin)]
    probes = _rewrite_probes(prompt, subject, target, old, list(dict.fromkeys(paraphrases)))
    for names in (("locality_prompt", "locality_ground_truth"), ("loc", "loc_ans")):
        for question, answer in _answered(fields, *names, origin):
            probes.append(Probe("specificity", question, answer, target if answer == old != target else None))
    # A persona's wording counts with portability, as in published tables: generalisation is that of `rephrase` alone.
    probes += [
        Probe("portability", asked.replace("{}", subject), target) for asked in texts(fields, "personas", origin)
    ]
    probes += _grouped_probes("portability", fields, "portability", origin)
    probes += [Probe("multihop", *pair) for pair in _answered(fields, "mhop", "mhop_ans", origin)]
    probes += _grouped_probes("specificity", fields, "locality", origin)
    relation = name_in(fields, "relation", origin) or None
    case_id = _case_id(fields, number, origin)
    return Edit(case_id, prompt, subject, target, old, relation, probes=tuple(probes), origin=origin)


def _answered(fields: Mapping[str, Any], asked: str, given: str, origin: str) -> list[tuple[str, str]]:
    """Questions of one field with their answers in another; pairs with a blank question or answer are left out.

    Raises:
        RecordError: If the numbers of questions and answers differ.
    """
    questions, answers = items(fields.get(asked)), items(fields.get(given))
    if len(questions) != len(answers) and texts(fields, asked, origin):
        raise _unanswered(asked, len(questions), given, len(answers), origin)
    found = []
    for question, answer in zip(questions, answers, strict=False):
        both = [*checked_texts([question], repr(asked), origin), *checked_texts([answer], repr(given), origin)]
        found += [(_finished(both[0], asked, origin), both[1])] if len(both) == 2 else []
    return found


def _finished(question: str, name: str, origin: str) -> str:
    if "{}" in question:
        raise RecordError(
            f"{origin}: the field {name!r} holds {question!r}, expected a finished text without '{{}}': it asks about "
            "another subject; write that subject in its place"
        )
    return question


def _unanswered(asked: str, questions: int, given: str, answers: int, origin: str) -> RecordError:
    return RecordError(
        f"{origin}: {asked!r} holds {questions} question{'s' * (questions != 1)} and {given!r} {answers or 'no'} "
        f"answer{'s' * (answers != 1)}, expected an answer to each; add what is missing, or leave the questions out"
    )


def _grouped_probes(kind: ProbeKind, fields: Mapping[str, Any], name: str, origin: str) -> list[Probe]:
    """Questions with the accepted forms of their answers: KnowEdit's groups of them, or a list as in QAEdit."""
    held = fields.get(name) or ()
    if not isinstance(held, (Mapping, list, tuple)):
        raise _no_questions(name, held, origin)
    groups = {f"{name}.{group}": asked for group, asked in held.items()} if isinstance(held, Mapping) else {name: held}
    probes = []
    for path, questions in groups.items():
        if not isinstance(questions, (list, tuple, type(None))):
            raise _no_questions(path, questions, origin)
        for question in items(questions):
            probes += _answered_probe(kind, question, path, origin)
    return probes


def _answered_probe(kind: ProbeKind, question: Any, path: str, origin: str) -> list[Probe]:
    """One question that is stored with its answers; none if either is blank."""
    named = [names for names in _QUESTIONS if isinstance(question, Mapping) and set(names) <= set(question)]
    if not named:
        raise _no_questions(path, question, origin)
    asked, given = named[0]
    forms = [form for answer in items(question[given]) for form in checked_texts(answer, f"'{path}' ({given})", origin)]
    prompts = checked_texts(question[asked], f"'{path}' ({asked})", origin)
    if not (forms and prompts):
        return []
    return [Probe(kind, _finished(prompts[0], path, origin), forms[0], aliases=tuple(forms[1:]))]


def _no_questions(name: str, found: Any, origin: str) -> RecordError:
    return RecordError(
        f"{origin}: the field {name!r} holds {found!r} ({type(found).__name__}), expected KnowEdit's groups, such as "
        '{"Reasoning": [{"prompt": "...", "ground_truth": "..."}]}, or a list as in QAEdit, such as '
        '[{"loc": "...", "loc_ans": "..."}]; write each question so, or leave the field out'
    )


def _rewrite_probes(prompt: str, subject: str, target: str, old: str | None, paraphrases: Sequence[str]) -> list[Probe]:
    rival = None if old == target else old  # an answer cannot be more probable than itself
    questions = [paraphrase.replace("{}", subject) for paraphrase in paraphrases]
    probes = [Probe("efficacy", prompt.replace("{}", subject, 1), target, rival)]
    return probes + [Probe("generalisation", question, target, rival) for question in questions]


def template_of(prompt: str, subject: str, origin: str) -> str:
    """The prompt with ``{}`` for the subject: as given, or in place of the subject's last mention.

    The last whole-word mention is taken, since a causal model has read the most context there.

    Raises:
        RecordError: If there is more than one ``{}``, or neither a ``{}`` nor the subject.
    """
    count = prompt.count("{}")
    if count == 1:
        return prompt
    if count > 1:
        raise RecordError(f"{origin}: the prompt {prompt!r} has {count} '{{}}', expected exactly one")
    # One text in two normal forms is one text: the prompt's own form is kept where the subject's is the same.
    normal = [(unicodedata.normalize(form, prompt), unicodedata.normalize(form, subject)) for form in _FORMS]
    for form, name in [(prompt, subject), *normal]:
        mentions = list(re.finditer(_whole_words(name), form))
        if mentions:
            start = mentions[-1].start()
            return form[:start] + "{}" + form[start + len(name) :]
    raise RecordError(
        f"{origin}: the prompt {prompt!r} has no '{{}}' and does not contain the subject {subject!r}"
        f"{_likeness(prompt, subject)}; write '{{}}' where the subject belongs"
    )


def _likeness(prompt: str, subject: str) -> str:
    """What of a subject is in a prompt that does not contain it."""
    if subject in prompt:
        return " as a word of its own (it is a part of another one)"
    similar = re.search(r"\s+".join(map(re.escape, subject.split())), prompt, re.IGNORECASE)
    return f" as it is written (there is {similar[0]!r})" if similar else ""


def _whole_words(subject: str) -> str:
    """A pattern of the subject where no letter of a script with spaces touches it."""
    before = "" if re.match(f"[{_SPACELESS}]", subject) else rf"(?<![^\W{_SPACELESS}])"
    after = "" if re.match(f"[{_SPACELESS}]", subject[-1:]) else rf"(?![^\W{_SPACELESS}])"
    return before + re.escape(subject) + after


def check_no_contradictions(edits: Iterable[Edit]) -> None:
    """Refuse two edits that give one question two answers: no weights can satisfy both.

    Raises:
        RecordError: Naming both records, of each such pair.
    """
    seen: dict[str, Edit] = {}
    faults = []
    for edit in edits:
        first = seen.setdefault(edit.question, edit)
        if first.target.strip() != edit.target.strip():
            faults.append(
                f"{edit.origin} contradicts {first.origin}: {edit.question!r} cannot be both "
                f"{first.target!r} and {edit.target!r}; remove one of them"
            )
    check_no_faults(faults, "records contradict others")


def skip_written(edits: Iterator[Edit], written: Iterable[Mapping[str, Any]], name: str) -> int:
    """Advance past the edits that an earlier run has written, which must be the same ones in the same order.

    Args:
        edits: All edits.
        written: Ledger lines of the edits that were written.
        name: Where the edits come from, for messages.

    Returns:
        The number of written edits.

    Raises:
        RecordError: If an edit differs from the one that was written, or is missing.
    """
    count = 0
    for count, line in enumerate(written, start=1):
        edit = next(edits, None)
        if edit is None:
            raise RecordError(
                f"{name}: ends after {count - 1} edits, but the run to resume has written more, the next for "
                f"{_fact(line)}; give the data that it was started with, or another --trainer.run_dir"
            )
        if _fact(vars(edit)) != _fact(line):
            raise RecordError(
                f"{edit.origin or name}: expected the record that the run to resume has written as its edit "
                f"{count - 1}, {_fact(line)}, got {_fact(vars(edit))}; give the data that it was started with, "
                "or another --trainer.run_dir"
            )
    return count


def _fact(fields: Mapping[str, Any]) -> str:
    """The fact of an edit or a ledger line, on which its target depends."""
    return f"{fields['prompt']!r} of {fields['subject']!r}: {fields['target']!r}"
