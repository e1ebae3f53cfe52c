"""Texts about entities that have o*, and how similar other texts are to them: COUNTERFACT's consistency (RS)."""

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
    """Texts about entities that have o*, and the TF-IDF that compares other texts with them.

    Attributes:
        label: Description of the texts, for messages.
    """

    def __init__(self, label: str, vectorizer: Any, by_fact: Any = None, corpus: Any = (), words: Any = None) -> None:
        self.label = label
        self._vectorizer = vectorizer
        self._by_fact = by_fact  # texts by relation and target, or None where a corpus is searched
        self._corpus = corpus
        self._words = words  # TF-IDF of each text of the corpus, sparse by column (CSC), [texts, words]
        self._vectors: dict[Hashable, Any] = {}  # references are long, and each is needed before and after the edit

    @classmethod
    def of(cls, source: str, subset: str | None = None) -> References:
        """References from COUNTERFACT's own downloads or from any corpus.

        Args:
            source: A folder with ``attribute_snippets.json``, or that file (``idf.npy`` and ``tfidf_vocab.json``
                beside it are used if both are there); else a corpus as :func:`corpus_texts` reads it, of which the
                first 100,000 texts are used.
            subset: Subset of a hub data set.

        Raises:
            FileNotFoundError: If there is neither.
            CorpusError: If it has no usable texts.
        """
        path = Path(locate(source))
        if path.is_dir() or path.name == _SNIPPETS:
            return cls._of_snippets(path / _SNIPPETS if path.is_dir() else path)
        try:
            texts = list(itertools.islice(corpus_texts(source, subset), MOST_TEXTS))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"no reference texts {source!r}: not a local file or folder, and not available from the hub. Expected "
                f"COUNTERFACT's {_SNIPPETS} or its folder, or a corpus: .jsonl, .csv or .parquet with a column 'text', "
                "plain text with one text per line, or a hub data set. Without them leave the consistency out."
            ) from error
        vectorizer, words = _fitted(texts, source)
        return cls(f"texts of {source} that name the target", vectorizer, None, texts, words.tocsc())

    @classmethod
    def _of_snippets(cls, path: Path) -> References:
        by_fact = _read_snippets(path)
        idf, vocabulary = path.with_name("idf.npy"), path.with_name("tfidf_vocab.json")
        if idf.is_file() and vocabulary.is_file():
            vectorizer = _given_vectorizer(idf, vocabulary)
        else:
            log.info("TF-IDF is fitted on %s: no %s and %s beside it", path, idf.name, vocabulary.name)
            vectorizer, _ = _fitted([text for texts in by_fact.values() for text in texts], str(path))
        return cls("COUNTERFACT's reference texts", vectorizer, by_fact)

    def consistency(self, texts: Sequence[str], *, target: str, relation: str | None, target_id: str | None) -> float:
        """Cosine of the TF-IDF of texts and of a target's references: RS before it is multiplied by 100.

        Args:
            texts: All generated texts of a record. For texts without a word of the vocabulary the cosine is 0.
            target: The target o*, which is searched for in a corpus.
            relation: The record's ``relation_id``, which selects COUNTERFACT's texts together with ``target_id``.
            target_id: The target's ``id``.

        Returns:
            NaN if there are no texts or no references.
        """
        reference = self._reference_vector(target, relation, target_id) if texts else None
        if reference is None:
            return math.nan
        return float(self._vectorizer.transform([" ".join(texts)]).multiply(reference).sum())

    def _reference_vector(self, target: str, relation: str | None, target_id: str | None) -> Any:
        """Normalized TF-IDF, sparse, shape [1, words], or ``None`` without references."""
        name, by_fact = target.strip(), self._by_fact
        key: Hashable = name if by_fact is None else (relation, target_id)
        if key not in self._vectors:
            found = self._naming(name) if by_fact is None else by_fact.get(key, ())
            vector = self._vectorizer.transform([" ".join(found)])
            self._vectors[key] = vector if vector.nnz else None
        return self._vectors[key]

    def _naming(self, name: str) -> list[str]:
        """The first 100 texts of the corpus that contain a name as whole words."""
        columns = [self._vectorizer.vocabulary_.get(word) for word in self._vectorizer.build_analyzer()(name)]
        if not name or None in columns:
            return []
        # Only texts that have all of its words need reading; a name may have none that the vectorizer sees ("C").
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
            "Download COUNTERFACT's file again."
        ) from error
    return by_fact


def _given_vectorizer(idf_path: Path, vocabulary_path: Path) -> Any:
    """COUNTERFACT's own vectorizer."""
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer

    try:
        vectorizer = TfidfVectorizer(vocabulary=json.loads(vocabulary_path.read_text(encoding="utf-8")))
        vectorizer.idf_ = np.asarray_chkfinite(np.load(idf_path, allow_pickle=False), dtype=np.float64)
    except (ValueError, TypeError, AttributeError, EOFError) as error:
        raise CorpusError(
            f"{idf_path} and {vocabulary_path.name}: unusable ({error}); expected an array of numbers and a JSON "
            "object that gives each word its index there. Download both again, or remove both to fit on the snippets."
        ) from error
    return vectorizer


def _fitted(texts: Sequence[str], origin: str) -> tuple[Any, Any]:
    """A vectorizer fitted on texts, and their TF-IDF, sparse, shape [texts, words]."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer()
    try:
        return vectorizer, vectorizer.fit_transform(texts)
    except ValueError as error:
        raise CorpusError(f"{origin}: no words in its {len(texts)} texts ({error}); give another corpus") from error
