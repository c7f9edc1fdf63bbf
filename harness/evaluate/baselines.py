"""What a model must at least beat: an order-2 byte model, and gzip."""

from __future__ import annotations

import gzip
from collections.abc import Iterable

import numpy as np


def order2_bits_per_byte(training: Iterable[bytes], held_out: Iterable[bytes]) -> float:
    """Bits per byte of `held_out` under a byte model with two bytes of context, counted on `training`.

    Probabilities are interpolated down to shorter contexts by Witten and Bell's rule (method C of their 1991 paper):
    p(b | c) = (n(cb) + t(c) p(b | shorter c)) / (n(c) + t(c)), t(c) the number of different bytes seen after c; at the
    bottom every byte has 1/256. Each document starts with an empty context (two zero bytes).
    """
    pairs, following = _contexts(training)
    probability = np.full((1, 256), 1 / 256)
    # Context 0, 1 and 2 bytes long: a context's id is the last bytes read as a number, so `id % shorter` drops the
    # first.
    for contexts in (1, 256, 65536):
        counts = np.bincount((pairs % contexts) * 256 + following, minlength=contexts * 256).reshape(contexts, 256)
        kinds = np.count_nonzero(counts, axis=1, keepdims=True)
        shorter = probability[np.arange(contexts) % len(probability)]
        seen = counts.sum(axis=1, keepdims=True) + kinds
        probability = np.where(seen > 0, (counts + kinds * shorter) / np.maximum(seen, 1), shorter)
    pairs, following = _contexts(held_out)
    return float(-np.log2(probability[pairs, following]).mean())


def gzip_bits_per_byte(held_out: Iterable[bytes]) -> float:
    """Bits per byte of gzip -9 on all documents together."""
    text = b"".join(held_out)
    return 8 * len(gzip.compress(text, 9)) / len(text)


def _contexts(documents: Iterable[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """For every byte of every document: the two bytes before it as a number, and the byte."""
    pairs, following = [], []
    for document in documents:
        padded = np.frombuffer(b"\0\0" + document, dtype=np.uint8).astype(np.int64)
        pairs.append(padded[:-2] * 256 + padded[1:-1])
        following.append(padded[2:])
    return np.concatenate(pairs), np.concatenate(following)
