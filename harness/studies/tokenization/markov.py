"""Markov sources of any order: their text, and what any model of it can reach at best."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class MarkovSource:
    """P(next symbol | the last `order` symbols), over the first `alphabet` letters."""

    order: int
    alphabet: int
    table: np.ndarray
    """float64 [alphabet ** order, alphabet], rows summing to 1, all positive. A state counts its symbols in base
    `alphabet`, the newest as the last digit."""

    @classmethod
    def switching(cls, order: int, probability: float, alphabet: int = 2) -> MarkovSource:
        """The next symbol is that of `order` symbols ago, or with `probability` one of the others (arXiv 2404.08335,
        section 2, of two symbols). The symbols in between say nothing."""
        states = np.arange(alphabet**order)
        oldest = states // alphabet ** (order - 1)
        table = np.full((len(states), alphabet), probability / (alphabet - 1))
        table[states, oldest] = 1 - probability
        return cls(order, alphabet, table)

    @classmethod
    def dirichlet(cls, order: int, alphabet: int, concentration: float, seed: int) -> MarkovSource:
        """Every row drawn from a symmetric Dirichlet distribution, kept off zero by a thousandth."""
        drawn = np.random.default_rng(seed).dirichlet(np.full(alphabet, concentration), size=alphabet**order)
        table = 0.999 * drawn + 0.001 / alphabet
        return cls(order, alphabet, table / table.sum(1, keepdims=True))

    def stationary(self) -> np.ndarray:
        """The long-run share of every state: float64 [alphabet ** order]."""
        count = len(self.table)
        weight = np.full(count, 1 / count)
        following = (np.arange(count)[:, None] * self.alphabet + np.arange(self.alphabet)) % count
        for _ in range(100_000):
            new = np.bincount(following.ravel(), (weight[:, None] * self.table).ravel(), minlength=count)
            new = 0.5 * (new + weight)  # which also converges where states come round in turn
            if np.abs(new - weight).sum() < 1e-15:
                break
            weight = new
        return np.asarray(new / new.sum())

    def entropy_rate(self) -> float:
        """Nats a symbol: the lowest loss there is."""
        return float(-(self.stationary()[:, None] * self.table * np.log(self.table)).sum())

    def context_loss(self, symbols: int) -> float:
        """Nats a symbol of the best model that sees the last `symbols` symbols only; 0: the unigram loss."""
        if symbols >= self.order:
            return self.entropy_rate()
        joint = (self.stationary()[:, None] * self.table).reshape(-1, self.alphabet**symbols, self.alphabet).sum(0)
        conditional = joint / joint.sum(1, keepdims=True)
        return float(-(joint * np.log(conditional)).sum())

    def unigram_loss(self) -> float:
        """Nats a symbol of the best model without a context."""
        return self.context_loss(0)

    def sample(self, documents: int, length: int, generator: np.random.Generator) -> np.ndarray:
        """Symbols, uint8 [documents, length], each document begun in the long run."""
        state = generator.choice(len(self.table), p=self.stationary(), size=documents)
        upper = np.cumsum(self.table, axis=1)[:, :-1]
        symbols = np.empty((documents, length), dtype=np.uint8)
        for place in range(length):
            new = (generator.random(documents)[:, None] >= upper[state]).sum(1)
            symbols[:, place] = new
            state = (state * self.alphabet + new) % len(self.table)
        return symbols

    def text(self, documents: int, length: int, generator: np.random.Generator) -> list[str]:
        """`sample` as letters."""
        letters = np.frombuffer(LETTERS[: self.alphabet].encode(), dtype=np.uint8)
        return [row.tobytes().decode() for row in letters[self.sample(documents, length, generator)]]
