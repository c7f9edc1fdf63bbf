"""Compile the Triton kernels of the linear cross-entropy for GPUs that need not be there, and see what they take.

    python tools/compile_kernels.py --out compiled_kernels.json
    python tools/compile_kernels.py --arch 90 --tiling 128x256x64:8:4:tma      # a tiling that is not in the table

Every kernel is compiled in every tiling that can be chosen (fused/tilings.py), with each of the terms and with all of
them, by the launcher itself: fused/launch.py is called with tensors that hold nothing, under a driver that knows a
target and no device, so signatures, constants, divisibility and options are those of a real call. Needs this
repository, torch, triton and numpy; nothing has to be installed, no GPU, and not TRITON_INTERPRET.

Of each kernel: registers, stack and spills as ptxas counts them, shared memory, how many programs fit onto a
multiprocessor, and how many instructions of its PTX multiply matrices or copy tiles. Exits with 1 where one breaks a
rule: it does not compile, takes more shared memory or tensor memory than a block may have, spills more than its budget,
has no matrix instructions for 16-bit inputs, has them one after another, or does not fit as often as its grid assumes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if os.environ.get("TRITON_INTERPRET") == "1":
    raise SystemExit("compile_kernels: TRITON_INTERPRET=1 runs kernels in the interpreter; unset it to compile them")
sys.path.insert(0, str(ROOT))
import harness  # noqa: E402

harness.__path__.append(str(ROOT))  # kernels/ is harness.kernels, also where nothing is installed (see pyproject.toml)

import torch  # noqa: E402
import triton  # noqa: E402
from torch import Tensor  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402

from harness.kernels.linear_cross_entropy.fused import device, launch, passes, tilings  # noqa: E402
from harness.kernels.linear_cross_entropy.types import Terms  # noqa: E402

SHARED_BYTES = {80: 166_912, 86: 101_376, 87: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448}
SHARED_BYTES |= {120: 101_376, 121: 101_376}
"""That a block may have, by compute capability: CUDA C++ programming guide, technical specifications."""
RESERVED_SHARED_BYTES = 1024
"""Of each block, by the system. A multiprocessor has as much as one block may have, and this."""
REGISTERS, MOST_WARPS = 65_536, {86: 48, 87: 48, 89: 48, 120: 48, 121: 48}
"""Of a multiprocessor; warps where they are not 64."""
TENSOR_MEMORY_COLUMNS = 512
MATRIX_INSTRUCTIONS = {80: "mma.sync.aligned", 90: "wgmma.mma_async.", 100: "tcgen05.mma.", 120: "mma.sync.aligned"}
"""From which capability on. `mma.sync` on sm_90 would be half as fast as it can be."""
STACK_BYTES = {"default": 0, "plain": 64, "one term": 256, "all terms": 1024}
"""Budgets: of the plain loss of 16 bits in the tilings that it gets unless told otherwise, and in others; of one thing
more than that; of everything at once."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STRIP = 1024


@dataclass(frozen=True)
class Case:
    """What is compiled in, and the shapes as far as the compiler sees them: what is a multiple of 16."""

    name: str
    terms: tuple[tuple[str, float], ...] = ()
    bias: bool = False
    class_weights: bool = False
    entropy: bool = False
    top: bool = False
    filtered: bool = False
    tokens: int = 8192
    columns: int = 128256
    width: int = 4096

    def head(self, dtype: torch.dtype) -> launch.Head:
        return launch.Head(
            hidden=nothing(self.tokens, self.width, dtype=dtype),
            weight=nothing(self.columns, self.width, dtype=dtype),
            bias=nothing(self.columns, dtype=dtype) if self.bias else None,
            class_weights=nothing(self.columns) if self.class_weights else None,
            labels=nothing(self.tokens, dtype=torch.int32),
            terms=Terms(self.columns, **dict(self.terms)),
        )

    @property
    def rich(self) -> bool:
        head = self.head(torch.bfloat16)
        return passes.is_rich(head, entropy=self.entropy, top=self.top) or self.filtered

    def budget(self, default: bool) -> str:
        """Which of STACK_BYTES holds."""
        if self == PLAIN:
            return "default" if default else "plain"
        return "all terms" if self in (ALL_AT_ONCE, ALL_WITH_LOGITS) else "one term"


SMOOTHING, POWERS = ("label_smoothing", 0.1), ("tau", 1.5)
ALL = {"bias": True, "class_weights": True, "entropy": True, "top": True, "filtered": True}
ALL_TERMS = (("softcap", 30.0), ("temperature", 0.7), SMOOTHING)
PLAIN = Case("plain")
ALL_AT_ONCE = Case("all, tau 1.5", (*ALL_TERMS, POWERS), **ALL)
ALL_WITH_LOGITS = Case("all, tau 1", ALL_TERMS, **ALL)
IN_EVERY_TILING = (PLAIN, Case("bias", bias=True), ALL_AT_ONCE)
IN_DEFAULT_TILINGS = (
    Case("ragged", tokens=8191, columns=50257, width=4104),
    Case("rows not aligned", width=4097),
    Case("temperature", (("temperature", 0.7),)),
    Case("softcap", (("softcap", 30.0),)),
    Case("smoothing", (SMOOTHING,)),
    Case("smoothing, tau 1.5", (SMOOTHING, POWERS)),
    Case("class weights", (SMOOTHING,), class_weights=True),
    Case("entropy", entropy=True),
    Case("top", top=True),
    Case("filter", filtered=True),
    ALL_WITH_LOGITS,
)
CASES = (*IN_EVERY_TILING, *IN_DEFAULT_TILINGS)
KERNELS = (*tilings.KERNELS, "sparse_product")


@dataclass(frozen=True)
class Job:
    """A kernel to compile; `default`: in the tiling that the table begins with."""

    kernel: str
    capability: int
    dtype: str
    case: Case
    tiling: tilings.Tiling
    default: bool
    side: str = ""
    """Of a sparse product: the gradient that it makes."""

    def start(self) -> None:
        """Calls the launcher."""
        head, case, tiling = self.case.head(DTYPES[self.dtype]), self.case, self.tiling
        if self.kernel == "facts":
            launch.run_facts(head, tiling, entropy=case.entropy, top=case.top, tile_lses=case.filtered)
            return
        gradient = nothing(case.tokens, STRIP, dtype=head.hidden.dtype)
        token_tiles = -(-case.tokens // tiling.tokens)
        if self.kernel == "gradient":
            tops = nothing(case.tokens, dtype=torch.int32) if case.top else None
            column_tiles = -(-case.columns // tiling.columns)
            kept = nothing(token_tiles, column_tiles, dtype=torch.int8) if case.filtered else None
            sums = nothing(token_tiles, STRIP) if case.bias else None
            coefficients = nothing(7, case.tokens)
            strip = range(STRIP, 2 * STRIP)
            launch.run_gradient(head, tiling, strip, coefficients, tops, kept, gradient, sums, entropy=case.entropy)
            return
        kept = nothing(token_tiles, -(-STRIP // tiling.columns), dtype=torch.int8)
        sizes = (tiling.tokens, tiling.columns)
        if self.side == "hidden":
            out = nothing(case.tokens, case.width)
            launch.run_sparse_product(gradient, head.weight[:STRIP], kept, sizes, out, add=True)
        else:
            out = nothing(STRIP, case.width)
            launch.run_sparse_product(gradient.t(), head.hidden, kept.t(), sizes[::-1], out, add=False)


@dataclass(frozen=True)
class Row:
    """What came out. `programs`: that a multiprocessor has in the grid; `resident`: that fit onto it at a time.
    `matrix`, `tma` and `async_copies`: how many such instructions the PTX has."""

    sm: int
    kernel: str
    dtype: str
    case: str
    tiling: str
    default: bool
    programs: int
    registers: int = 0
    stack_bytes: int = 0
    spill_store_bytes: int = 0
    spill_load_bytes: int = 0
    shared_bytes: int = 0
    resident: int = 0
    matrix: int = 0
    tma: int = 0
    async_copies: int = 0
    broken: tuple[str, ...] = ()


def nothing(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor with a shape, strides and an address (0, so aligned), and no memory."""
    return torch.empty(*shape, dtype=dtype, device="meta")


class Driver:
    """In the place of CUDA's: a target without a device."""

    capability = 0

    def get_current_device(self) -> int:
        return self.capability  # what is compiled is remembered by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


class Compiler:
    """Compiles what the launcher starts, and keeps what ptxas said about it."""

    def __init__(self) -> None:
        self.driver = Driver()
        self.compiled: list[tuple[str, Any]] = []
        self.logs: dict[str, str] = {}
        kernels = {name: value for name, value in vars(device).items() if name.endswith("_kernel")}
        unknown = kernels.keys() - {f"{name}_kernel" for name in KERNELS}
        if unknown:
            raise SystemExit(f"compile_kernels: does not know how {', '.join(sorted(unknown))} of device.py is started")
        triton.runtime.driver.set_active(self.driver)
        triton.knobs.nvidia.dump_ptxas_log = True
        for name, kernel in kernels.items():
            kernel.run = self._instead_of_running(name, kernel)

    def _instead_of_running(self, name: str, kernel: triton.JITFunction) -> Callable[..., None]:
        def run(*arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                found = triton.JITFunction.run(kernel, *arguments, grid=grid, warmup=True, **options)
            self.logs.setdefault(found.hash, printed.getvalue())
            self.compiled.append((name, found))

        return run

    def __call__(self, job: Job) -> Row:
        self.driver.capability = job.capability
        self.compiled.clear()
        what = f"{job.kernel}: {job.side}" if job.side else job.kernel
        tiling = f"{job.tiling.tokens}x{job.tiling.columns}" if job.side else str(job.tiling)
        row = Row(job.capability, what, job.dtype, job.case.name, tiling, job.default, job.tiling.programs)
        try:
            job.start()
        except Exception as error:  # whatever the compiler cannot do is a finding
            reason = str(error).strip().partition("\n")[0]
            return Row(**asdict(row) | {"broken": (f"does not compile: {type(error).__name__}: {reason}",)})
        ((_, found),) = self.compiled
        return measure(row, job, found, self.logs[found.hash])


def measure(row: Row, job: Job, found: Any, log: str) -> Row:
    """The row of a compiled kernel, filled in."""
    ptx, shared = found.asm["ptx"], found.metadata.shared
    registers = number(r"Used (\d+) registers", log)
    warps = found.metadata.num_warps
    limit = SHARED_BYTES[job.capability]
    fitting = [
        REGISTERS // (-(-registers // 8) * 8 * 32 * warps),
        (limit + RESERVED_SHARED_BYTES) // (shared + RESERVED_SHARED_BYTES),
        MOST_WARPS.get(job.capability, 64) // warps,
    ]
    instruction = matrix_instruction(job.capability)
    filled = asdict(row) | {
        "registers": registers,
        "stack_bytes": number(r"(\d+) bytes stack frame", log),
        "spill_store_bytes": number(r"(\d+) bytes spill stores", log),
        "spill_load_bytes": number(r"(\d+) bytes spill loads", log),
        "shared_bytes": shared,
        "resident": min(fitting),
        "matrix": ptx.count(instruction),
        "tma": ptx.count("cp.async.bulk.tensor."),
        "async_copies": len(re.findall(r"cp\.async\.c[ag]\.", ptx)),
    }
    serialized = "wgmma.mma_async instructions are serialized" in log
    tensor_memory = getattr(found.metadata, "tmem_size", None) or 0
    return Row(**filled | {"broken": tuple(broken_rules(Row(**filled), job, serialized, tensor_memory))})


def number(pattern: str, log: str) -> int:
    """What ptxas -v says of a kernel."""
    found = re.search(pattern, log)
    if found is None:
        raise SystemExit(f"compile_kernels: nothing like {pattern!r} in what ptxas printed: {log.strip()!r}")
    return int(found[1])


def matrix_instruction(capability: int) -> str:
    """How the PTX for a target multiplies matrices of 16 bits."""
    return MATRIX_INSTRUCTIONS[max(least for least in MATRIX_INSTRUCTIONS if least <= capability)]


def broken_rules(row: Row, job: Job, serialized: bool, tensor_memory: int) -> Iterator[str]:
    limit = SHARED_BYTES[row.sm]
    if row.shared_bytes > limit:
        yield f"{row.shared_bytes:,} bytes of shared memory, a block may have {limit:,}"
    if tensor_memory > TENSOR_MEMORY_COLUMNS:
        yield f"{tensor_memory} columns of tensor memory, there are {TENSOR_MEMORY_COLUMNS}"
    kind = job.case.budget(job.default and job.dtype != "fp32")
    if row.stack_bytes > STACK_BYTES[kind]:
        yield f"{row.stack_bytes} bytes of stack, {STACK_BYTES[kind]} are the budget ({kind})"
    if row.dtype != "fp32" and not row.matrix:
        yield f"no {matrix_instruction(row.sm).strip('.')} instructions"
    if serialized:
        yield "its wgmma instructions run one after another"
    if job.tiling.descriptors and not job.side and not row.tma:
        yield "no TMA instructions"
    if not job.side and 0 < row.resident < job.tiling.programs:
        yield f"{row.resident} programs fit onto a multiprocessor, the grid has {job.tiling.programs}"


def all_jobs(capability: int, quick: bool, given: Sequence[tilings.Tiling]) -> Iterator[Job]:
    """What is compiled for a target: of the table's tilings, or of given ones."""
    for dtype in ("bf16",) if quick or given else DTYPES:
        for case, kernel in product(cases_of(dtype, capability, quick), tilings.KERNELS):
            found = table(kernel, capability, dtype, case)
            if given:
                found = dict.fromkeys(given, False)
            elif quick and case != PLAIN:
                found = dict([*found.items()][:1])
            elif quick or dtype == "fp16" or case not in IN_EVERY_TILING:
                found = {tiling: default for tiling, default in found.items() if default}
            for tiling, default in found.items():
                yield Job(kernel, capability, dtype, case, tiling, default)
        if dtype != "fp16" and (capability >= 90 or not quick):
            yield from sparse_jobs(capability, dtype, quick, given)


def cases_of(dtype: str, capability: int, quick: bool) -> tuple[Case, ...]:
    """fp16 is compiled as bf16 is, and fp32 is what the blocked form is for: a few cases of them will do."""
    if dtype == "fp16" or (quick and capability < 90):
        return (PLAIN,)
    return (PLAIN, ALL_AT_ONCE) if quick or dtype == "fp32" else CASES


def table(kernel: str, capability: int, dtype: str, case: Case) -> dict[tilings.Tiling, bool]:
    """The tilings that a case can get, and which of them it gets unless another was measured to be faster."""
    found: dict[tilings.Tiling, bool] = {}
    describable = launch.describes(case.head(DTYPES[dtype]).hidden)
    for few_tokens in (False, True):
        problem = tilings.ProblemClass(kernel, capability, DTYPES[dtype].itemsize, case.rich, few_tokens)
        fitting = [tiling for tiling in tilings.candidates(problem) if describable or not tiling.descriptors]
        with_pointers = [tiling for tiling in fitting if not tiling.descriptors]
        for tiling in fitting:
            found[tiling] = found.get(tiling, False) or tiling in (fitting[0], with_pointers[0])
    return found


def sparse_jobs(capability: int, dtype: str, quick: bool, given: Sequence[tilings.Tiling]) -> Iterator[Job]:
    """The products that leave tiles out: of the same tiles as the gradient kernel's."""
    found = given or [*table("gradient", capability, dtype, Case("filter", filtered=True))]
    by_size = {(tiling.tokens, tiling.columns): tiling for tiling in reversed(found)}
    kept = [found[0]] if quick else by_size.values()
    for tiling, side in product(kept, ("hidden", "weight")):
        yield Job("sparse_product", capability, dtype, PLAIN, tiling, False, side)


def parse_tiling(text: str) -> tilings.Tiling:
    """128x256x64:8:4:tma, the last part only with descriptors."""
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+):(\d+):(\d+)(:tma)?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 128x256x64:8:4:tma (tile:warps:stages, with TMA)")
    return tilings.Tiling(*map(int, found.groups()[:5]), descriptors=found[6] is not None)


def versions(architectures: list[int]) -> dict[str, str]:
    """Of what compiled; different ptxas for different targets."""
    found = {"triton": triton.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return found | {f"ptxas sm_{arch}": get_ptxas(arch).version for arch in architectures}


def write(path: Path, rows: list[Row], about: dict[str, Any], *, add: bool) -> None:
    """One line a row. `add`: keep what the file has from other versions of Triton."""
    runs, lines = [about], [{"triton": triton.__version__, **asdict(row)} for row in rows]
    if add and path.exists():
        there = json.loads(path.read_text())
        runs = [run for run in there["runs"] if run["versions"]["triton"] != triton.__version__] + runs
        lines = [line for line in there["rows"] if line["triton"] != triton.__version__] + lines
    head = json.dumps({"runs": runs}, indent=1).removesuffix("\n}")
    path.write_text(head + ',\n "rows": [\n' + ",\n".join(json.dumps(line) for line in lines) + "\n ]\n}\n")


def show(row: Row) -> None:
    fit = f"{row.resident}/{row.programs}"
    print(
        f"sm_{row.sm:<4}{row.kernel:23} {row.dtype} {row.case:19}{row.tiling:40}{row.registers:4}{row.stack_bytes:6}"
        f"{row.shared_bytes:8}{fit:>5}{row.matrix:5}{row.tma:4}{row.async_copies:5}  {'; '.join(row.broken)}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(SHARED_BYTES), default=[80, 90, 100])
    parser.add_argument("--quick", action="store_true", help="bf16, the table's defaults; on sm_80 only plain")
    parser.add_argument("--tiling", type=parse_tiling, nargs="+", default=[], help="instead of the table's, in bf16")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    names = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="+", choices=names, default=names, metavar="CASE", help=", ".join(names))
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--add", action="store_true", help="keep what FILE has from other versions of Triton")
    arguments = parser.parse_args()
    compile_job, rows = Compiler(), []
    print(f"{'':92}regs stack  shared  fit  mma tma copy")
    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder  # what is in a cache was compiled in silence
        for arch in arguments.arch:
            for job in all_jobs(arch, arguments.quick, arguments.tiling):
                if job.kernel not in arguments.kernels or job.case.name not in arguments.cases:
                    continue
                rows.append(compile_job(job))
                show(rows[-1])
    about = {
        "command": shlex.join(["python", "tools/compile_kernels.py", *sys.argv[1:]]),
        "machine": f"no GPU used; {platform.machine()}, {os.cpu_count()} cores",
        "versions": versions(arguments.arch),
    }
    if arguments.out:
        write(arguments.out, rows, about, add=arguments.add)
    broken = [row for row in rows if row.broken]
    print(f"{len(rows)} kernels, {len(broken)} break a rule; {about['versions']}")
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
