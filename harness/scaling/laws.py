"""The laws. Losses in nats a token; N parameters (say which count), D tokens, C FLOPs."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from .law import Columns, Law, Parameter, exponential

_FLOOR = Parameter("E", "irreducible loss", "nats a token", "log", (0.5, 1.0, 1.7, 2.5))
_EXPONENTS = (0.1, 0.3, 0.5, 0.8)


class Power(Law):
    """A power law with a constant, of one quantity."""

    name = "power"
    title = "power law plus constant"
    formula = "L(x) = E + (x0 / x)^alpha"
    source = "Henighan et al. 2020, arXiv 2010.14701, equation 1.1; Kaplan et al. 2020, arXiv 2001.08361"
    columns: ClassVar = {"x": "what is scaled: parameters, tokens or FLOPs", "loss": "nats a token"}
    parameters = (
        _FLOOR,
        Parameter("x0", "where the reducible loss is one nat", "as x", "log", (1e2, 1e5, 1e8, 1e12, 1e18)),
        Parameter("alpha", "exponent", "", "linear", _EXPONENTS),
    )
    identifiability = (
        "E and alpha are told apart by curvature in log-log: three sizes at the least, and the loss of the largest "
        "must be nearer to E than that of the smallest by a good part of the whole fall."
    )

    def value_and_gradient(self, theta: np.ndarray, x: Columns) -> tuple[np.ndarray, np.ndarray]:
        floor, floor_gradient = exponential(theta, {0: 1.0}, 3)
        log_x = np.log(x["x"])
        alpha, distance = theta[..., 2, None], theta[..., 1, None] - log_x
        term = np.exp(np.minimum(alpha * distance, 700.0))
        gradient = np.stack([np.zeros_like(term), term * alpha, term * distance], axis=-1)
        return floor + term, floor_gradient + gradient


class Chinchilla(Law):
    """Loss of parameters and tokens."""

    name = "chinchilla"
    title = "parametric law of parameters and tokens"
    formula = "L(N, D) = E + A / N^alpha + B / D^beta"
    source = "Hoffmann et al. 2022, arXiv 2203.15556, approach 3; Besiroglu et al. 2024, arXiv 2404.10102"
    columns: ClassVar = {"parameters": "N", "tokens": "D, seen in training", "loss": "nats a token"}
    parameters = (
        Parameter("A", "size of the term of parameters", "nats x parameters^alpha", "log", (1.0, 1e2, 1e4, 1e7)),
        Parameter("B", "size of the term of tokens", "nats x tokens^beta", "log", (1.0, 1e2, 1e4, 1e7)),
        _FLOOR,
        Parameter("alpha", "exponent of parameters", "", "linear", _EXPONENTS),
        Parameter("beta", "exponent of tokens", "", "linear", _EXPONENTS),
    )
    identifiability = (
        "N and D must vary apart from each other: at one ratio D/N the two terms cannot be told apart. The exponents "
        "are those of the count of parameters that was used: leaving out embeddings or the head changes them."
    )

    def value_and_gradient(self, theta: np.ndarray, x: Columns) -> tuple[np.ndarray, np.ndarray]:
        parts = (
            exponential(theta, {0: 1.0, 3: -np.log(x["parameters"])}, 5),
            exponential(theta, {1: 1.0, 4: -np.log(x["tokens"])}, 5),
            exponential(theta, {2: 1.0}, 5),
        )
        return _total(parts)


class Overtraining(Law):
    """Loss of parameters and tokens a parameter, with one exponent for both."""

    name = "overtraining"
    title = "over-training law"
    formula = "L(N, M) = E + A N^-k + B 6^(-k/2) (M N)^-k"
    source = "Gadre et al. 2024, arXiv 2403.08540, equation 4 (k = -e there)"
    columns: ClassVar = {"parameters": "N", "tokens": "D = M N", "loss": "nats a token"}
    parameters = (
        Parameter("A", "size of the term of parameters", "nats x parameters^k", "log", (1.0, 1e2, 1e4)),
        Parameter("B", "size of the term of tokens", "nats x tokens^k", "log", (1.0, 1e2, 1e4)),
        _FLOOR,
        Parameter("k", "exponent", "", "linear", _EXPONENTS),
    )
    identifiability = "Needs runs of at least two ratios M of tokens to parameters, and of at least two sizes."

    def value_and_gradient(self, theta: np.ndarray, x: Columns) -> tuple[np.ndarray, np.ndarray]:
        parts = (
            exponential(theta, {0: 1.0, 3: -np.log(x["parameters"])}, 4),
            exponential(theta, {1: 1.0, 3: -np.log(x["tokens"]) - 0.5 * np.log(6.0)}, 4),
            exponential(theta, {2: 1.0}, 4),
        )
        return _total(parts)


class Annealing(Law):
    """Loss along one run, of the learning rates so far."""

    name = "annealing"
    title = "learning-rate annealing law"
    formula = "L(s) = L0 + A S1^-alpha - C S2"
    source = "Tissue et al. 2024, arXiv 2408.11029, equation 1; S1 and S2 by harness.scaling.annealing_areas"
    columns: ClassVar = {
        "s1": "sum of the learning rates so far",
        "s2": "the annealing area: the momentum of their falls, summed",
        "loss": "nats a token",
    }
    parameters = (
        Parameter("L0", "loss without end at a constant rate", "nats a token", "log", (1.0, 2.0, 3.0, 4.0)),
        Parameter("A", "size of the power term", "nats x rate^alpha", "log", (0.1, 0.5, 2.0)),
        Parameter("C", "what annealing gains", "nats a unit of S2", "log", (0.05, 0.3, 2.0)),
        Parameter("alpha", "exponent", "", "linear", (0.3, 0.5, 0.8)),
    )
    identifiability = (
        "C is not identified where the rate never falls: S2 is zero there, as in the beginning of every run."
    )

    def value_and_gradient(self, theta: np.ndarray, x: Columns) -> tuple[np.ndarray, np.ndarray]:
        falls, falls_gradient = exponential(theta, {2: 1.0}, 4)
        gain = falls * x["s2"]
        rest = _total((exponential(theta, {0: 1.0}, 4), exponential(theta, {1: 1.0, 3: -np.log(x["s1"])}, 4)))
        return rest[0] - gain, rest[1] - falls_gradient * x["s2"][:, None]


class EncoderDecoder(Law):
    """Loss of the sizes of an encoder and of a decoder."""

    name = "encoder-decoder"
    title = "encoder-decoder law"
    formula = "L(Ne, Nd) = a (Ne0 / Ne)^pe (Nd0 / Nd)^pd + E"
    source = "Ghorbani et al. 2021, arXiv 2109.07740, equation 5"
    columns: ClassVar = {
        "encoder": "Ne, parameters of the encoder",
        "decoder": "Nd, parameters of the decoder",
        "loss": "nats a token",
    }
    parameters = (
        Parameter("a", "reducible loss at Ne0 and Nd0", "nats a token", "log", (0.1, 0.5, 2.0)),
        Parameter("pe", "exponent of the encoder", "", "linear", (0.05, 0.2, 0.5)),
        Parameter("pd", "exponent of the decoder", "", "linear", (0.05, 0.2, 0.5)),
        _FLOOR,
    )
    identifiability = (
        "a and Ne0, Nd0 are not both identifiable: the latter are fixed, at the data's geometric means. Encoder and "
        "decoder must vary apart from each other."
    )

    def value_and_gradient(self, theta: np.ndarray, x: Columns) -> tuple[np.ndarray, np.ndarray]:
        factors = {}
        for place, name in ((1, "encoder"), (2, "decoder")):
            log = np.log(x[name])
            fixed = x.get(f"{name}0")
            factors[place] = (log.mean() if fixed is None else np.log(fixed)) - log
        return _total((exponential(theta, {0: 1.0, **factors}, 4), exponential(theta, {3: 1.0}, 4)))


LAWS: dict[str, Law] = {law.name: law for law in (Power(), Chinchilla(), Overtraining(), Annealing(), EncoderDecoder())}


def annealing_areas(rates: np.ndarray, decay: float = 0.999) -> tuple[np.ndarray, np.ndarray]:
    """S1 and S2 after every step, float64 [steps], of learning rates [steps]: S1 = Σ rate, S2 = Σ m with
    m_i = decay m_{i-1} + (rate_{i-1} - rate_i) and no fall at the first step (arXiv 2408.11029, section 3)."""
    from scipy.signal import lfilter

    rates = np.asarray(rates, dtype=np.float64)
    falls = np.concatenate([[0.0], rates[:-1] - rates[1:]])
    momentum = lfilter([1.0], [1.0, -decay], falls)
    return np.cumsum(rates), np.cumsum(momentum)


def _total(parts: tuple[tuple[np.ndarray, np.ndarray], ...]) -> tuple[np.ndarray, np.ndarray]:
    value, gradient = parts[0]
    for more, more_gradient in parts[1:]:
        value, gradient = value + more, gradient + more_gradient
    return value, gradient
