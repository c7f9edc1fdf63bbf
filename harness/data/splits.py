"""Which documents are held out."""

from __future__ import annotations

SPLITS = ("train", "validation", "test")


def split_of(digest: bytes, validation_share: float, test_share: float) -> str:
    """The split of a document by the hash of its content.

    Equal documents fall on the same side, in whatever corpus or order they come, and raising one share moves
    documents only between that split and its neighbour.
    """
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < test_share:
        return "test"
    return "validation" if place < test_share + validation_share else "train"
