"""Documents that hold a target, or another text that must not be chosen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from .config import LeaksSection
from .signatures import WORD


class LeakCheck:
    """Compares documents with forbidden texts by runs of words, as contamination is commonly checked for.

    (Brown et al., arXiv 2005.14165, appendix C, take runs of 13 words.)
    """

    def __init__(self, forbidden: Sequence[bytes], section: LeaksSection) -> None:
        self._lengths: list[int] = []
        self._holders: dict[int, dict[int, list[int]]] = {}
        """By length of a run and its hash: the texts that have it."""
        self._section = section
        for number, text in enumerate(forbidden):
            words = _words(text.decode(errors="replace"))
            length = min(len(words), section.words)
            runs = set(_runs(words, length)) if len(words) >= section.least_words else set()
            self._lengths.append(len(runs))
            for run in runs:
                self._holders.setdefault(length, {}).setdefault(run, []).append(number)

    def share(self, document: str) -> float:
        """The largest part of a forbidden text's word runs that the document has."""
        words = _words(document)
        found: Counter[int] = Counter()
        for length, holders in self._holders.items():
            for run in set(_runs(words, length)) & holders.keys():
                found.update(holders[run])
        return max((count / self._lengths[number] for number, count in found.items()), default=0.0)


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _runs(words: list[str], length: int) -> Iterator[int]:
    """Hashes, which Python makes anew in each process."""
    return (hash(tuple(words[start : start + length])) for start in range(len(words) - length + 1))
