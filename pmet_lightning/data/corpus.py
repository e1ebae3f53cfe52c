"""General text for the second moments: streamed, shuffled with a seed, packed into rows of one length."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from pmet_lightning.data import earth
from pmet_lightning.data.fields import RecordError
from pmet_lightning.data.text_files import check_encoding, csv_rows
from pmet_lightning.data.token_rows import TokenRow
from pmet_lightning.data.vocabulary import check_ids
from pmet_lightning.utils.errors import PmetError, first_line
from pmet_lightning.utils.hub import check_reachable
from pmet_lightning.utils.resources import locate

SAMPLED = "sampled-corpus"  # text that a model writes: evaluation/sampled_corpus.py
_SUBSETS = {"wikimedia/wikipedia": "20231101.en"}  # of data sets that have no text without one
_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_SHUFFLE_BUFFER = 10_000  # texts
_TEXTS_PER_CALL = 64  # texts in one call of the tokenizer


class CorpusError(PmetError):
    """A corpus without usable text."""


def corpus_texts(name: str, subset: str | None = None, seed: int = 0) -> Iterator[str]:
    """Texts of a corpus, streamed, in an order given by a seed.

    Args:
        name: A local file (.jsonl, .csv or .parquet with a column 'text', or anything else as plain text, one text
            per line), a hub data set with a column 'text', or the shipped 'atlas-corpus' or 'earth-corpus'.
        subset: Subset of a hub data set; ``None`` takes '20231101.en' for 'wikimedia/wikipedia', and none for others.
        seed: Seed of the order; texts are shuffled within a window of 10,000.

    Raises:
        FileNotFoundError: If there is no such corpus.
        CorpusError: If it is empty or unreadable, or has no column 'text' with a text in each row.
    """
    path = Path(locate(name))
    if path.is_file() and path.stat().st_size == 0:
        raise CorpusError(f"{name}: the file is empty, expected texts; give another corpus")
    try:
        for row in _rows(path, name, subset).shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER):
            text = row.get("text")
            if not isinstance(text, str):
                raise _no_text(path, name, subset)
            if text.strip():
                yield text.strip()
    except CorpusError:
        raise
    except RecordError as error:  # of a CSV file: it names the line
        raise CorpusError(str(error)) from error
    except Exception as error:
        if path.is_file():
            raise _unreadable(path, name, error) from error
        raise FileNotFoundError(
            f"no corpus {name!r}: not a local file, and not available from the hub ({first_line(error)}). "
            "Without a network, set --moments.corpus to a local file: .jsonl, .csv or .parquet with a column 'text', "
            "plain text with one text per line, or 'sampled-corpus' (text that the model itself writes)."
        ) from error


def _no_text(path: Path, name: str, subset: str | None) -> CorpusError:
    """The error of a corpus with a row that holds no text: in the file's order, the first of them."""
    for number, row in enumerate(_rows(path, name, subset)):
        if "text" not in row:
            return CorpusError(f"{name}: expected a column 'text', found {', '.join(map(str, row))}")
        if not isinstance(row["text"], str):
            found = f"{row['text']!r} ({type(row['text']).__name__})"
            return CorpusError(f"{name}, record {number}: expected a text in the column 'text', found {found}")
    return CorpusError(f"{name}: expected a column 'text' with a text in each row")  # the hub's has changed meanwhile


def _unreadable(path: Path, name: str, error: Exception) -> CorpusError:
    """The error of a local corpus that the library cannot read; of a text file, with the line where it is no UTF-8."""
    try:
        if _kind(path) != "parquet":
            check_encoding(path, name)
    except RecordError as found:
        return CorpusError(str(found))
    return CorpusError(f"{name}: unreadable as {_kind(path)} ({first_line(error)})")


def _kind(path: Path) -> str:
    return _BUILDERS.get(path.suffix, "text")


def _rows(path: Path, name: str, subset: str | None) -> Any:
    """The rows of a corpus, an ``IterableDataset``."""
    import datasets

    if name == earth.CORPUS and not path.exists():
        return datasets.IterableDataset.from_generator(earth.neighbor_texts)
    if _kind(path) == "csv" and path.is_file():  # the library would guess types, and read the text 1.10 as 1.1
        return datasets.IterableDataset.from_generator(csv_rows, gen_kwargs={"path": path, "name": name})
    if path.is_file():
        return datasets.load_dataset(_kind(path), data_files=str(path), split="train", streaming=True)
    check_reachable()
    return datasets.load_dataset(name, _subset_of(name, subset), split="train", streaming=True)


def _subset_of(name: str, subset: str | None) -> str | None:
    """The subset that is read: none where the text is not the hub's."""
    return None if name == SAMPLED else subset or _SUBSETS.get(name)


def corpus_fingerprint(name: str, subset: str | None = None) -> str:
    """Hash of the bytes that a local corpus is made of; name and subset of a hub corpus."""
    path = Path(locate(name))
    if name == earth.CORPUS and not path.exists():
        path = earth.TABLE
    if not path.is_file():
        return f"{name}:{_subset_of(name, subset)}"
    status = path.stat()
    return _digest(path, status.st_size, status.st_mtime_ns)


def corpus_name(name: str, subset: str | None = None) -> str:
    """What a corpus is called where it is not at hand: the name of a local file, name and subset of a hub corpus."""
    if is_at_hand(name):
        return Path(name).name
    read = _subset_of(name, subset)
    return name if read is None else f"{name}:{read}"


def is_at_hand(name: str) -> bool:
    """Whether a corpus is a local file, or ships with the package."""
    return name == earth.CORPUS or Path(locate(name)).is_file()


@cache
def _digest(path: Path, size: int, modified: int) -> str:
    """Hash of a file's bytes; read once as long as its size and modification time stay the same."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def pack_rows(texts: Iterable[str], tokenizer: Any, length: int, rows: int | None = None) -> Iterator[TokenRow]:
    """Join texts, with a space between them, into rows of ``length`` tokens; the last may be shorter.

    Every row begins with what the tokenizer puts before a text (BOS, or nothing): a model that has learned to rely
    on it would otherwise compute other keys.

    Args:
        texts: Any texts.
        tokenizer: A Hugging Face tokenizer.
        length: Tokens per row.
        rows: Number of rows of the model's embedding; ``None`` where it is not known.

    Raises:
        VocabularyError: If a text holds a token beyond the embedding.
        CorpusError: If the length leaves no room for text.
    """
    start = prefix_of(tokenizer)
    stream: list[int] = []
    room = length - len(start)
    if room < 1:
        raise CorpusError(
            f"--moments.length is {length}, expected more than the {len(start)} tokens that the tokenizer puts before "
            "a text"
        )
    first = True
    remaining = iter(texts)
    while batch := list(itertools.islice(remaining, _TEXTS_PER_CALL)):
        joined = [text if first and i == 0 else f" {text}" for i, text in enumerate(batch)]
        first = False
        for text, ids in zip(batch, _tokenize(tokenizer, joined), strict=True):
            check_ids(ids, text, rows)
            stream += ids
        while len(stream) >= room:
            yield TokenRow([*start, *stream[:room]])
            del stream[:room]
    if stream:
        yield TokenRow([*start, *stream])


def _tokenize(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids of each text. In one that spells the unknown token, special tokens are read as plain text.

    WikiText writes rare words as ``<unk>``. As a token no model has learned it, and of a perplexity it would be most.
    """
    found: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    unknown, id_ = tokenizer.unk_token, tokenizer.unk_token_id
    if unknown is None or id_ in (tokenizer.bos_token_id, tokenizer.eos_token_id):  # GPT-2's stands between texts
        return found
    return [
        tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if unknown in text and id_ in ids
        else ids
        for text, ids in zip(texts, found, strict=True)
    ]


def prefix_of(tokenizer: Any) -> list[int]:
    """Special tokens that the tokenizer puts before a text."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    leading = itertools.takewhile(bool, encoded["special_tokens_mask"])
    return [id_ for id_, _ in zip(encoded["input_ids"], leading, strict=False)]
