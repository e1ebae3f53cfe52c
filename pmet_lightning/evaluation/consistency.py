"""Texts about entities that have o*, and how like them other texts are: COUNTERFACT's consistency (RS)."""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from pmet_lightning.data.corpus import CorpusError, corpus_texts
from pmet_lightning.utils.resources import locate

log = logging.getLogger(__name__)

_SNIPPETS = "attribute_snippets.json"
MOST_REFERENCES = 100  # texts of a corpus that one target is compared with
MOST_TEXTS = 100_000  # texts read of a corpus: a hub one may have millions


class References:
    """Texts about entities that have o*, and the TF-IDF to compare other texts with them.

    Attributes:
        label: What the texts are, for the table of scores.
    """

    def __init__(self, label: str, vectoriser: Any, by_fact: Any = None, corpus: Any = (), words: Any = None) -> None:
        self.label = label
        self._vectoriser = vectoriser
        self._by_fact = by_fact  # texts by relation and target, or None where a corpus is searched
        self._corpus = corpus
        self._words = words  # of each text of the corpus, sparse, [texts, words], by column
        self._vectors: dict[Hashable, Any] = {}  # references are long, and each is asked for before and after the edit

    @classmethod
    def of(cls, source: str, subset: str | None = None) -> References:
        """References from COUNTERFACT's own downloads or from any corpus.

        Args:
            source: A folder with ``attribute_snippets.json``, or that file (``idf.npy`` and ``tfidf_vocab.json``
                beside it are used if both are there); else a corpus as :func:`corpus_texts` reads it, of which the
                first 100,000 texts count.
            subset: Subset of a hub data set.

        Raises:
            FileNotFoundError: If there is neither.
            CorpusError: If there is, but without usable texts.
        """
        path = Path(locate(source))
        if path.is_dir() or path.name == _SNIPPETS:
            return cls._of_snippets(path / _SNIPPETS if path.is_dir() else path)
        try:
            texts = list(itertools.islice(corpus_texts(source, subset), MOST_TEXTS))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"no reference texts {source!r}: not a local file or folder, and not to be had from the hub. Expected "
                f"COUNTERFACT's {_SNIPPETS} or its folder, or a corpus: .jsonl, .csv or .parquet with a column 'text', "
                "plain text with one text a line, or a hub data set. Without them leave the consistency out."
            ) from error
        vectoriser, words = _fitted(texts, source)
        return cls(f"texts of {source} that name the target", vectoriser, None, texts, words.tocsc())

    @classmethod
    def _of_snippets(cls, path: Path) -> References:
        by_fact = _read_snippets(path)
        idf, vocabulary = path.with_name("idf.npy"), path.with_name("tfidf_vocab.json")
        if idf.is_file() and vocabulary.is_file():
            vectoriser = _given_vectorizer(idf, vocabulary)
        else:
            log.info("TF-IDF is fitted on %s: no %s and %s beside it", path, idf.name, vocabulary.name)
            vectoriser, _ = _fitted([text for texts in by_fact.values() for text in texts], str(path))
        return cls("COUNTERFACT's reference texts", vectoriser, by_fact)

    def consistency(self, texts: Sequence[str], *, target: str, relation: str | None, target_id: str | None) -> float:
        """Cosine of the TF-IDF of texts and of the references of a target, RS before it is multiplied by 100.

        Args:
            texts: All generated texts of a record. The cosine of texts without a word that the TF-IDF knows is 0.
            target: The target o*, which a corpus is searched for.
            relation: The record's ``relation_id``, which with the next one finds COUNTERFACT's texts.
            target_id: The target's ``id``.

        Returns:
            NaN if there are no texts or no references.
        """
        reference = self._reference_vector(target, relation, target_id) if texts else None
        if reference is None:
            return math.nan
        return float(self._vectoriser.transform([" ".join(texts)]).multiply(reference).sum())

    def _reference_vector(self, target: str, relation: str | None, target_id: str | None) -> Any:
        """Normalised TF-IDF, sparse, shape [1, words], or ``None`` without references."""
        name, by_fact = target.strip(), self._by_fact
        key: Hashable = name if by_fact is None else (relation, target_id)
        if key not in self._vectors:
            found = self._naming(name) if by_fact is None else by_fact.get(key, ())
            vector = self._vectoriser.transform([" ".join(found)])
            self._vectors[key] = vector if vector.nnz else None
        return self._vectors[key]

    def _naming(self, name: str) -> list[str]:
        """Texts of the corpus in which a name stands as whole words, the first 100."""
        columns = [self._vectoriser.vocabulary_.get(word) for word in self._vectoriser.build_analyzer()(name)]
        if not name or None in columns:
            return []
        # Only texts that have all of its words need reading; a name may have none that the vectoriser sees ("C").
        ends = self._words.indptr
        having = [set(self._words.indices[ends[column] : ends[column + 1]].tolist()) for column in columns]
        candidates = sorted(set.intersection(*having)) if having else range(len(self._corpus))
        whole = re.compile(rf"(?<!\w){re.escape(name)}(?!\w)")
        hits = (self._corpus[i] for i in candidates if whole.search(self._corpus[i]))
        return list(itertools.islice(hits, MOST_REFERENCES))


def _read_snippets(path: Path) -> dict[tuple[str, str], list[str]]:
    """Texts of COUNTERFACT's file by relation and target."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; expected COUNTERFACT's {_SNIPPETS}, or give a corpus instead")
    by_fact: dict[tuple[str, str], list[str]] = {}
    where = str(path)
    try:
        for number, entry in enumerate(json.loads(path.read_text(encoding="utf-8"))):
            where = f"{path}, entry {number}"
            texts = [str(sample["text"]) for sample in entry["samples"]]
            by_fact.setdefault((entry["relation_id"], entry["target_id"]), []).extend(texts)
    except (ValueError, KeyError, TypeError) as error:
        raise CorpusError(
            f"{where}: malformed ({error!r}); expected a JSON list of {{relation_id, target_id, samples: [{{text}}]}}. "
            "Download COUNTERFACT's file anew."
        ) from error
    return by_fact


def _given_vectorizer(idf_path: Path, vocabulary_path: Path) -> Any:
    """COUNTERFACT's own vectoriser."""
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer

    try:
        vectoriser = TfidfVectorizer(vocabulary=json.loads(vocabulary_path.read_text(encoding="utf-8")))
        vectoriser.idf_ = np.asarray_chkfinite(np.load(idf_path, allow_pickle=False), dtype=np.float64)
    except (ValueError, TypeError, AttributeError, EOFError) as error:
        raise CorpusError(
            f"{idf_path} and {vocabulary_path.name}: unusable ({error}); expected an array of numbers and a JSON "
            "object that gives each word its index there. Download both anew, or remove both to fit on the snippets."
        ) from error
    return vectoriser


def _fitted(texts: Sequence[str], origin: str) -> tuple[Any, Any]:
    """A vectoriser fitted on texts, and their TF-IDF, sparse, shape [texts, words]."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectoriser = TfidfVectorizer()
    try:
        return vectoriser, vectoriser.fit_transform(texts)
    except ValueError as error:
        raise CorpusError(f"{origin}: no words in its {len(texts)} texts ({error}); give another corpus") from error
