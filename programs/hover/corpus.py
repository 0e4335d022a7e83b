"""BM25 over a corpus: the invented world's, or a JSONL file's. Indexed once a process, searched from any thread."""

import json
import threading
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .world import entities


@dataclass(frozen=True)
class Document:
    """What a search returns."""

    title: str
    text: str


class Corpus:
    """Documents with their index. Not changed once made, so that rollouts in many threads may share it."""

    def __init__(self, documents: Iterable[Document]) -> None:
        """Indexes titles and texts; raises ValueError where bm25s is missing or there is nothing to index."""
        bm25s = _bm25s()
        self.documents = tuple(documents)
        self.texts = {fold(document.title): document.text for document in self.documents}
        words = [_words(bm25s, f"{document.title} {document.text}") for document in self.documents]
        if not any(words):
            raise ValueError("the corpus has no words in it: give documents with a title and a text")
        self._tokenizer = bm25s
        self._index = bm25s.BM25(backend="numpy")
        self._index.index(words, show_progress=False)

    def search(self, query: str, k: int) -> tuple[Document, ...]:
        """The best `k` documents that share a word with the query, fewer if fewer do.

        Equal scores come in the corpus's order, on every machine: bm25s' own selection leaves that open.
        """
        import numpy as np

        words = _words(self._tokenizer, query)
        if not words:
            return ()
        scores = self._index.get_scores(words)
        matching = np.flatnonzero(scores > 0)
        best = matching[np.argsort(-scores[matching], kind="stable")[:k]]
        return tuple(self.documents[place] for place in best)


_CORPORA: dict[str | None, Corpus] = {}
_LOCK = threading.Lock()


def corpus_at(path: str | None) -> Corpus:
    """The corpus in a JSONL file, or the invented one for None; indexed when first asked for."""
    with _LOCK:
        if path not in _CORPORA:
            _CORPORA[path] = Corpus(_invented() if path is None else read_documents(Path(path)))
        return _CORPORA[path]


def read_documents(path: Path) -> list[Document]:
    """Lines of `{"title": ..., "text": ...}`; a text may be a list of sentences. Raises ValueError for others."""
    if not path.is_file():
        raise ValueError(f"FST_HOVER_CORPUS is {str(path)!r}, which is no file: name a JSONL file of title and text")
    with path.open(encoding="utf-8") as lines:
        return [_document(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def fold(title: str) -> str:
    """A title as titles are compared: case and the many ways to write an accent do not count."""
    return " ".join(unicodedata.normalize("NFKC", title).casefold().split())


def _invented() -> list[Document]:
    return [Document(entity.title, entity.text) for entity in entities()]


def _document(line: str, where: str) -> Document:
    try:
        row = json.loads(line)
        title, text = row["title"], row["text"]
        text = " ".join(text) if isinstance(text, list) else text
        if not isinstance(title, str) or not isinstance(text, str):
            raise TypeError("title and text must be strings")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{where} is no {{"title": "...", "text": "..."}}: {error!r}') from error
    return Document(title, text)


def _words(bm25s: Any, text: str) -> list[str]:
    words: list[str] = bm25s.tokenize(text, stopwords="en", return_ids=False, show_progress=False)[0]
    return words


def _bm25s() -> Any:
    try:
        import bm25s
    except ImportError as error:
        raise ValueError("hover searches with bm25s, which is not installed: pip install bm25s") from error
    return bm25s
