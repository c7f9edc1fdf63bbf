"""What is checked: inputs, terms, sizes and data types, each a Case; on the CPU the same in small."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

ALL_OUTPUTS = ("lse", "logprob", "entropy", "max_prob", "correct")
EVERYTHING: dict[str, Any] = {
    "tensors": ("bias", "class_weights", "token_weights"),
    "settings": {"shift": 1, "label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 20.0, "temperature": 0.7},
    "outputs": ALL_OUTPUTS,
    "padding": 57,
    "ignored": 0.2,
}
IN_FP32 = "weight's gradient in fp32"
TERMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"tensors": ("bias",)},
    "class weights": {"tensors": ("class_weights",)},
    "token weights": {"tensors": ("token_weights",)},
    "shift": {"settings": {"shift": 2}},
    "tau 0, sum-exponential": {"tau": 0.0},
    "tau 0.5": {"tau": 0.5},
    "tau 1.7, generalised cross-entropy": {"tau": 1.7},
    "tau 2, mean absolute error": {"tau": 2.0},
    "rho": {"tau": 1.0, "rho": 1.7},
    "adversarial": {"tau": 1.0, "nu": 0.3, "tensors": ("perturbed_hidden",)},
    "label smoothing": {"settings": {"label_smoothing": 0.1}},
    "label smoothing, class weights": {"settings": {"label_smoothing": 0.2}, "tensors": ("class_weights",)},
    "label smoothing, tau 1.7, class weights": {
        "settings": {"label_smoothing": 0.2},
        "tau": 1.7,
        "tensors": ("class_weights",),
    },
    "z-loss": {"settings": {"z_loss": 1e-2}},
    "softcap": {"settings": {"softcap": 10.0}},
    "softcap, bias, temperature": {"settings": {"softcap": 5.0, "temperature": 0.5}, "tensors": ("bias",)},
    "temperature": {"settings": {"temperature": 1.8}},
    "lse": {"outputs": ("lse",)},
    "logprob": {"outputs": ("logprob",)},
    "entropy": {"outputs": ("entropy",)},
    "max_prob, correct": {"outputs": ("max_prob", "correct")},
    "all outputs": {"outputs": ALL_OUTPUTS},
    "padding": {"padding": 57},
    "mean": {"settings": {"reduction": "mean"}},
    "sum": {"settings": {"reduction": "sum"}},
    "mean, weights, ignored, lse": {
        "settings": {"reduction": "mean"},
        "tensors": ("class_weights", "token_weights"),
        "outputs": ("lse",),
        "ignored": 0.3,
    },
    IN_FP32: {"settings": {"weight_grad_dtype": "fp32"}},
    "another ignore_index": {"settings": {"ignore_index": 3}, "ignored": 0.3},
    "everything": EVERYTHING,
    "everything, tau 1.7": {**EVERYTHING, "tau": 1.7, "rho": 1.3},
}
FEW_TERMS = ("bias", "softcap", "all outputs", "mean", "everything", "everything, tau 1.7")
"""For the data types that share most code with bf16."""
DATA = ("certain", "flat", "large", "masked", "spread")
LAYOUTS = ("offset", "every other row", "transposed weight", "expanded", "rows apart")
DTYPES = ("bf16", "fp16", "fp32")


@dataclass(frozen=True)
class Case:
    """One comparison with float64. Tokens may have several dimensions; a term that shifts needs the last of them."""

    name: str
    implementation: str
    dtype: str
    tokens: tuple[int, ...]
    vocab_size: int
    dim: int
    padding: int = 0
    """Rows of weight beyond the vocabulary."""
    data: str = "spread"
    """spread: the target's probability from about 0 to 1; certain: nearly 1; flat: all logits 0; large: logits of up to
    about ±1e4; masked: a bias of −inf at a quarter of the vocabulary; steep: a bias that falls from the first column to
    the last, with targets among the first."""
    ignored: float = 0.0
    """Share of the tokens."""
    tensors: tuple[str, ...] = ()
    layout: str = ""
    """How the matrices lie in memory; empty: row after row."""
    tau: float | None = None
    rho: float = 1.0
    nu: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    """Passed on; dtypes by name. reduction is "none" where not said."""
    outputs: tuple[str, ...] = ()
    small_blocks: bool = False
    """The backward's workspace as small as it can be: many chunks and strips."""
    tiling: tuple[str, int] | None = None
    """A kernel class's (see tilings.candidates) and the number of one in it; None: as chosen by itself."""
    chunked: bool = False
    """The reference runs over some tokens at a time."""
    poison_bytes: int = 1 << 28

    @property
    def reduction(self) -> str:
        return str(self.settings.get("reduction", "none"))


def list_cases(kind: str, seed: int, combinations: int) -> list[Case]:
    """All, in the order of importance; on the CPU in small."""
    small = kind == "cpu"
    base: dict[str, Any] = {"tokens": (3, 173), "vocab_size": 1031, "dim": 200}
    if small:
        base = {"tokens": (2, 15), "vocab_size": 100, "dim": 24}

    def case(implementation: str, dtype: str, what: str, **changes: Any) -> Case:
        values = {**base, **changes}
        return Case(name=f"{implementation}, {dtype}: {what}", implementation=implementation, dtype=dtype, **values)

    found: list[Case] = []
    # Tiles whose edges are cut, and whole ones: rows of 16 bytes or not, ends of strips or not.
    found += [case("triton", dtype, what, **changes) for dtype in DTYPES for what, changes in _sizes(small).items()]
    for data in DATA:
        shape: dict[str, Any] = {"data": data}
        if data == "certain":
            shape["dim"] = 32 if small else 256
        if data == "masked":
            shape["tensors"] = ("bias",)
        if data == "spread":
            shape["ignored"] = 0.4
        found += [
            case("triton", dtype, f"{data} softmax, ignored {shape.get('ignored', 0)}", **shape) for dtype in DTYPES
        ]
    found += [case("triton", dtype, "all ignored", ignored=1.0, outputs=ALL_OUTPUTS) for dtype in DTYPES]
    found += [case("triton", "bf16", what, **changes) for what, changes in TERMS.items() if what != "plain"]
    for dtype in ("fp16", "fp32"):
        found += [case("triton", dtype, what, **TERMS[what]) for what in FEW_TERMS]
    for dtype in DTYPES:
        changes = {"small_blocks": True, **({"tokens": (2, 36)} if small else {"tokens": (2, 300)})}
        found.append(case("triton", dtype, "many blocks", **changes))
        found.append(case("triton", dtype, "many blocks, everything", **{**EVERYTHING, **changes}))
    found += [case("triton", "bf16", f"layout: {layout}", layout=layout) for layout in LAYOUTS]
    found += [case("blocked", "fp32", what, **TERMS[what]) for what in TERMS]
    whole = [what for what in TERMS if what != IN_FP32]
    found += [case("blocked", "float64", what, **TERMS[what]) for what in whole]
    for dtype in ("bf16", "fp16"):
        found += [case("blocked", dtype, what, **TERMS[what]) for what in ("plain", *FEW_TERMS)]
    found += [case("blocked", "bf16", f"{data} softmax", data=data, dim=base["dim"] if data != "certain" else 64)
              for data in ("certain", "flat", "large")]  # fmt: skip
    found.append(case("blocked", "bf16", "all ignored", ignored=1.0, outputs=ALL_OUTPUTS))
    found += [_random_case(random.Random(f"{seed} {number}"), number, case) for number in range(combinations)]
    return [_for_dtype(each) for each in found]


def _sizes(small: bool) -> dict[str, dict[str, Any]]:
    def size(tokens: int, vocab_size: int, dim: int, **more: Any) -> tuple[str, dict[str, Any]]:
        return f"{tokens}x{vocab_size}x{dim}", {"tokens": (tokens,), "vocab_size": vocab_size, "dim": dim, **more}

    sizes = [size(1, 1, 1), size(0, 17, 8), size(1, 2, 8)]
    if small:
        sizes += [size(33, 65, 31), size(64, 128, 32), size(20, 70, 65)]
    else:
        sizes += [size(1, 50257, 768), size(127, 129, 127), size(129, 1000, 130), size(1027, 1000, 129)]
        sizes += [size(2048, 4096, 256), size(1000, 50257, 768, chunked=True, poison_bytes=2 << 30)]
    return dict(sizes)


def _random_case(draw: random.Random, number: int, case: Any) -> Case:
    """Each term in or out by chance."""

    def maybe(name: str, value: Any, chance: float = 0.4) -> dict[str, Any]:
        return {name: value} if draw.random() < chance else {}

    settings = {
        **maybe("shift", draw.randint(1, 3)),
        **maybe("label_smoothing", draw.uniform(0.01, 1.0)),
        **maybe("z_loss", draw.uniform(1e-4, 1e-1)),
        **maybe("softcap", draw.uniform(3.0, 40.0)),
        **maybe("temperature", draw.uniform(0.4, 2.5)),
        **maybe("reduction", draw.choice(["mean", "sum"])),
        **maybe("weight_grad_dtype", "fp32"),
    }
    tensors = tuple(name for name in ("bias", "class_weights", "token_weights") if draw.random() < 0.4)
    chosen: Case = case(
        "triton",
        draw.choice(("bf16", "bf16", "fp16", "fp32")),
        f"random combination {number}",
        settings=settings,
        tensors=tensors,
        tau=draw.choice((None, None, 0.5, 1.3, 2.0)),
        rho=draw.choice((1.0, 1.6)),
        outputs=tuple(name for name in ALL_OUTPUTS if draw.random() < 0.4),
        padding=draw.choice((0, 0, 9)),
        ignored=draw.choice((0.0, 0.3)),
        small_blocks=draw.random() < 0.3,
    )
    return replace(chosen, rho=1.0) if chosen.tau is None else chosen


def _for_dtype(case: Case) -> Case:
    """fp16 ends at 65504 and loses digits below 6e-5: losses that grow like 1/p are not for it, and the gradient of
    weight is taken in fp32."""
    if case.dtype != "fp16":
        return case
    case = replace(case, settings={**case.settings, "weight_grad_dtype": "fp32"})
    return replace(case, tau=1.3) if case.tau is not None and case.tau < 1.0 else case


def tiling_cases(kind: str, classes: dict[str, int]) -> Iterator[Case]:
    """Each tiling that can be chosen here, for the plain loss and for all terms; `classes`: how many a class has."""
    small = kind == "cpu"
    shape: dict[str, Any] = {"tokens": (64,), "vocab_size": 128, "dim": 32}
    if not small:
        shape = {"tokens": (1536,), "vocab_size": 4096, "dim": 256}
    for name, count in classes.items():
        rich = {**EVERYTHING, "padding": 64} if "rich" in name else {}
        for number in range(count):
            yield Case(
                name=f"triton, bf16: tiling {number} of {name}", implementation="triton", dtype="bf16",
                tiling=(name, number), **{**rich, **shape},
            )  # fmt: skip
