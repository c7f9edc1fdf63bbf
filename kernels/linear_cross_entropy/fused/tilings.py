"""How large the kernels' tiles are: a table by architecture and class of problem, or what was measured on request."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

KERNELS = ("facts", "gradient")
FEW_TOKENS = 1024


@dataclass(frozen=True)
class Tiling:
    """Tokens and columns of a tile of logits, the piece of the width that is multiplied at a time, and the compiler's
    options. `descriptors`: tiles are fetched by the copy engine (TMA, from Hopper on) instead of through pointers."""

    tokens: int
    columns: int
    width: int
    warps: int
    stages: int
    descriptors: bool = False
    programs: int = 1
    """Per multiprocessor, in the persistent grid."""

    def __str__(self) -> str:
        way = "TMA" if self.descriptors else "pointers"
        return f"{self.tokens}x{self.columns}x{self.width}, {self.warps} warps, {self.stages} stages, {way}"


@dataclass(frozen=True)
class ProblemClass:
    """What a tiling is chosen by."""

    kernel: str
    """One of KERNELS."""
    capability: int
    """90 for sm_90; 0 for Triton's interpreter."""
    element_bytes: int
    rich: bool
    """With terms beside the plain loss, which take registers: the tiles are smaller."""
    few_tokens: bool

    @property
    def key(self) -> str:
        return ",".join(str(value) for value in asdict(self).values())


def candidates(problem: ProblemClass) -> list[Tiling]:
    """All tilings that can be chosen for a class of problems; the first is the default."""
    if problem.capability == 0:
        sizes = (64, 128, 64), (32, 64, 32)
        return [Tiling(*size, 4, 2, descriptors) for size in sizes for descriptors in (False, True)]
    if problem.element_bytes == 4:  # no matrix instructions keep fp32 whole
        return [Tiling(64, 64, 32, 4, 2), Tiling(32, 64, 32, 4, 2)]
    if problem.capability >= 90:
        by_pointers = Tiling(128, 128, 64 if problem.capability < 100 else 32, 8, 3)
        return [*_with_descriptors(problem), by_pointers]
    return [Tiling(128, 128, 32, 8, 3), Tiling(128, 128, 64, 8, 3), Tiling(64, 128, 32, 4, 3), Tiling(64, 64, 32, 4, 3)]


def _with_descriptors(problem: ProblemClass) -> list[Tiling]:
    """From Hopper on, 16 bits. What would spill registers (benchmarks/compiled_kernels.json) is left out."""
    square = [Tiling(128, 128, 64, 8, 3, True), Tiling(128, 128, 64, 8, 4, True)]
    if problem.kernel == "facts" or not problem.rich:
        square.append(Tiling(128, 128, 64, 4, 3, True, programs=2))
    short = [Tiling(64, 128, 64, 4, 4, True)]
    if problem.kernel == "gradient":
        short.append(Tiling(64, 128, 64, 4, 3, True, programs=2))
    if problem.capability < 100 and (problem.kernel == "facts" or not problem.rich):
        short.append(Tiling(64, 256, 64, 4, 3, True))
    if problem.few_tokens:
        return short + square
    if problem.rich or problem.capability >= 100:
        return square
    # 128 accumulators a thread, which leave registers for the plain loss alone.
    wide = [Tiling(128, 256, 64, 8, 3, True), Tiling(256, 128, 64, 8, 3, True)]
    if problem.kernel == "facts":
        wide.append(Tiling(128, 256, 64, 8, 4, True))
    return wide + square


def choose(problem: ProblemClass, *, describable: bool) -> Tiling:
    """The tiling measured to be the fastest here, if it was (`tune`), else the table's. `describable`: the matrices may
    be fetched through descriptors."""
    fitting = [tiling for tiling in candidates(problem) if describable or not tiling.descriptors]
    measured = _read_cache().get(problem.key)
    if measured in fitting:
        return measured
    if problem.capability == 0:
        return fitting[0]
    return next((tiling for tiling in fitting if tiling.descriptors == describable), fitting[0])


def tune(problem: ProblemClass, measure: Callable[[Tiling], float], *, describable: bool) -> Tiling:
    """Measure (milliseconds) all that fit, remember the fastest in the cache file, and return it."""
    times: dict[Tiling, float] = {}
    for tiling in candidates(problem):
        if tiling.descriptors and not describable:
            continue
        try:
            times[tiling] = measure(tiling)
        except Exception as error:  # does not fit on this device: another one will
            logger.warning("tiling %s of %s cannot run here: %s", tiling, problem.kernel, error)
    if not times:
        raise RuntimeError(f"no tiling of {problem.kernel} runs here; the log says why for each")
    best = min(times, key=lambda tiling: times[tiling])
    for tiling, milliseconds in times.items():
        logger.info("%s: %s: %.3f ms%s", problem.key, tiling, milliseconds, ", chosen" if tiling is best else "")
    _write_cache(problem.key, best)
    return best


def cache_file() -> Path:
    """Where measured choices are kept: they hold for one device, torch and Triton."""
    import triton

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreter"
    table = [asdict(tiling) for tiling in _all_tilings()]  # another table asks for another measurement
    identity = json.dumps([device, torch.__version__, triton.__version__, table])
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "harness" / f"tilings-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"


def _all_tilings() -> Iterable[Tiling]:
    for capability in (0, 80, 90):
        for element_bytes in (2, 4):
            for rich in (False, True):
                for few in (False, True):
                    yield from candidates(ProblemClass("facts", capability, element_bytes, rich, few))


@lru_cache(maxsize=1)
def _read_cache() -> dict[str, Tiling]:
    path = cache_file()
    if not path.exists():
        return {}
    try:
        return {key: Tiling(**values) for key, values in json.loads(path.read_text()).items()}
    except (OSError, ValueError, TypeError) as error:
        logger.warning("%s: cannot be read (%s): tilings come from the table", path, error)
        return {}


def _write_cache(key: str, tiling: Tiling) -> None:
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    _read_cache.cache_clear()
    known = {name: asdict(value) for name, value in _read_cache().items()} | {key: asdict(tiling)}
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(known, indent=1))
    temporary.replace(path)
    _read_cache.cache_clear()
