"""Time and peak memory of losses and their gradients beside the three bare products, on the same random data.

Rounds are interleaved: each runs all methods once, in a new order, the caches emptied before each call. A method's time
is the median over rounds. The rate of the products (6·N·V·D operations over the sum of the three medians) is what all
are measured against, since a GPU's rate moves with data, shape and temperature.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from gpu.checks import plain, seed_of
from gpu.device import Device, Shape
from gpu.methods import Method, list_methods
from gpu.truth import Rows, compare_rows, exact_rows, sample_rows

PRODUCTS = ("logits = X W'", "dX = G W", "dW = G' X")
SAMPLED = 32
OTHERS_TOLERANCE = 0.1
"""Of losses that are not ours: they may keep logits and probabilities in bf16."""
MOST_LOGITS_BYTES = 6 << 30
"""Of the gradient of the logits that the products work on: more tokens are done in pieces of so many bytes."""


class Teller(Protocol):
    job: dict[str, Any]

    def tell(self, **message: Any) -> None: ...


@dataclass
class Data:
    """Random tensors of a shape; the target's probability goes from nothing to 1."""

    shape: Shape
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    exact: Rows


def draw(shape: Shape, device: Device, seed: int) -> Data:
    torch.manual_seed(seed_of(seed, str(shape)))
    where = {"device": device.torch}
    weight = (torch.randn(shape.vocab_size, shape.dim, **where) * (2 / shape.dim**0.5)).bfloat16()
    targets = torch.randint(shape.vocab_size, (shape.tokens,), **where)
    hidden = torch.randn(shape.tokens, shape.dim, **where)
    hidden += weight[targets].float() * (5 * torch.rand(shape.tokens, 1, **where))
    hidden = hidden.bfloat16()
    upstream = torch.full((shape.tokens,), 1.0 / shape.tokens, **where)
    rows = exact_rows(hidden, weight, targets, upstream, *sample_rows(targets, shape.vocab_size, SAMPLED))
    return Data(shape, hidden, weight, targets, rows)


class Products:
    """The three bare products, on the gradient of the logits as plain torch forms it."""

    def __init__(self, data: Data) -> None:
        step = max(1, min(data.shape.tokens, MOST_LOGITS_BYTES // (2 * data.shape.vocab_size)))
        self.share = step / data.shape.tokens
        """Of all tokens that one call does."""
        self.hidden, self.weight = data.hidden[:step], data.weight
        self.logits = self.hidden @ self.weight.T
        self.gradient = torch.empty_like(self.logits)
        for rows in torch.arange(step, device=data.hidden.device).split(512):
            probabilities = self.logits[rows].float().softmax(1)
            probabilities.scatter_add_(1, data.targets[rows, None], -torch.ones_like(probabilities[:, :1]))
            self.gradient[rows] = probabilities.bfloat16()
        self.dx, self.dw = torch.empty_like(self.hidden), torch.empty_like(self.weight)

    def works(self) -> dict[str, Callable[[], object]]:
        """One call each."""
        return dict(
            zip(
                PRODUCTS,
                (
                    lambda: torch.mm(self.hidden, self.weight.T, out=self.logits),
                    lambda: torch.mm(self.gradient, self.weight, out=self.dx),
                    lambda: torch.mm(self.gradient.T, self.hidden, out=self.dw),
                ),
                strict=True,
            )
        )


@dataclass
class Entry:
    """A method on a shape's data, its leaves and its times."""

    method: Method
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    times: list[float] = field(default_factory=list)

    def work(self) -> Tensor:
        """Loss, with the gradients left in .grad."""
        if self.method.forward_only:
            with torch.no_grad():
                return self.loss(self.hidden, self.weight, self.targets)
        loss = self.loss(self.hidden, self.weight, self.targets)
        loss.backward()
        return loss

    def forget(self) -> None:
        self.hidden.grad = self.weight.grad = None


def enter(method: Method, data: Data) -> Entry:
    """Raises what `make` raises."""
    leaves = [leaf.detach().requires_grad_() for leaf in (data.hidden, data.weight)]
    if method.wide:
        leaves[1].grad_dtype = torch.float32
    return Entry(method, method.make(), *leaves, data.targets)


def warm_up(entry: Entry, data: Data, device: Device) -> dict[str, Any]:
    """Compiles and runs, compares with float64 on the sampled rows, and takes the peak of memory of a second run."""
    started = time.perf_counter()
    loss = entry.work().detach()
    device.synchronize()
    first_seconds = time.perf_counter() - started
    found: dict[str, Any] = {"first_call_seconds": round(first_seconds, 2)}
    if entry.method.forward_only:
        errors = {"loss": (abs(float(loss) / float(data.exact.losses.mean()) - 1), 5e-5)}
    else:
        assert entry.hidden.grad is not None
        assert entry.weight.grad is not None
        errors = compare_rows(loss, entry.hidden.grad, entry.weight.grad, data.targets, data.exact, "bf16")
    found["errors"] = {what: [plain(error), tolerance] for what, (error, tolerance) in errors.items()}
    least = 0.0 if entry.method.ours else OTHERS_TOLERANCE
    found["right"] = all(error <= max(tolerance, least) for error, tolerance in errors.values())
    entry.forget()
    device.free()
    found["peak_bytes"] = device.peak_bytes(entry.work)
    entry.forget()
    found["host_milliseconds"] = device.host_milliseconds(entry.work)
    entry.forget()
    rows, width = data.weight.shape
    found["gradient_bytes_fp32"] = 0 if entry.method.forward_only else 4 * (len(data.hidden) + rows) * width
    return found


def measure_shape(shape: Shape, device: Device, job: dict[str, Any], teller: Teller, deadline: float) -> dict[str, Any]:
    """All methods on one shape; those that an earlier process died of are left out."""
    data = draw(shape, device, job["seed"])
    entries, records = [], []
    for method in list_methods(device):
        name = f"{shape}; {method.name}"
        record: dict[str, Any] = {"name": method.name, "ours": method.ours, "nvd": method.nvd}
        records.append(record)
        if name in job["lost"]:
            record["error"] = "the process died in it, or was stopped for saying nothing"
            continue
        teller.tell(begin=name)
        try:
            entry = enter(method, data)
            record |= warm_up(entry, data, device)
            entries.append(entry)
        except (ImportError, AttributeError) as error:
            record["error"] = f"not there: {error}"
        except Exception as error:
            record["error"] = f"{type(error).__name__}: {error}"[:500]
            if not device.alive():
                raise SystemExit(f"{name}: the device is lost: {error}") from error
        device.free()
        teller.tell(result={"name": name})
    teller.tell(begin=f"{shape}; rounds")
    products = Products(data)
    times = take_rounds(entries, products, device, deadline)
    return report(shape, times, products.share, entries, records)


def take_rounds(entries: list[Entry], products: Products, device: Device, deadline: float) -> dict[str, list[float]]:
    """The products' times; the methods' are kept with them."""
    works = products.works()
    times: dict[str, list[float]] = {name: [] for name in works}
    order = random.Random(0)
    for work in works.values():
        work()
    for number in range(device.rounds):
        if number >= device.least_rounds and time.time() > deadline:
            break
        todo: list[str | Entry] = [*works]
        todo += [entry for entry in entries if entry.method.rounds is None or number < entry.method.rounds]
        for each in order.sample(todo, len(todo)):
            if isinstance(each, Entry):
                each.times.append(device.milliseconds(each.work))
                each.forget()
            else:
                times[each].append(device.milliseconds(works[each]))
    return times


def report(
    shape: Shape, products: dict[str, list[float]], share: float, entries: list[Entry], records: list[dict[str, Any]]
) -> dict[str, Any]:
    """Medians, and what they are of the products' rate."""
    medians = {name: statistics.median(values) for name, values in products.items()}
    rate = 6 * shape.products * share / sum(medians.values())  # operations a millisecond
    by_name = {entry.method.name: entry.times for entry in entries}
    for record in records:
        times = by_name.get(record["name"])
        if not times:
            continue
        median = statistics.median(times)
        record |= {
            "milliseconds": median,
            "range": [min(times), max(times)],
            "rounds": len(times),
            "share_of_rate_at_8": 8 * shape.products / median / rate if record["nvd"] != 2 else None,
        }
        if record["nvd"]:
            record["share_of_rate"] = record["nvd"] * shape.products / median / rate
            record["tflops"] = record["nvd"] * shape.products / median / 1e9
        if record["gradient_bytes_fp32"]:
            beyond = record["peak_bytes"] - record["gradient_bytes_fp32"]
            record |= {"beyond_bytes": beyond, "beyond_share": beyond / record["gradient_bytes_fp32"]}
    return {
        "name": str(shape),
        "shape": list(shape),
        "products_tflops": rate / 1e9,
        "products": {
            name: {
                "milliseconds": medians[name] / share,
                "tflops": 2 * shape.products * share / medians[name] / 1e9,
                "rounds": len(products[name]),
            }
            for name in products
        },
        "methods": records,
    }


def measure_all(job: dict[str, Any], device: Device, teller: Teller) -> None:
    """All shapes; each has its part of the time that is left."""
    shapes = {str(shape): shape for shape in device.shapes}
    teller.tell(plan=list(shapes))
    left = [name for name in shapes if name not in job["finished"]]
    for number, name in enumerate(left):
        if f"{name}; rounds" in job["lost"]:
            teller.tell(result={"name": name, "error": "the process died in its rounds, or was stopped in them"})
            continue
        end = time.time() + (job["until"] - time.time()) / (len(left) - number)
        result = measure_shape(shapes[name], device, job, teller, end)
        teller.tell(result=result)
        torch.compiler.reset()
        device.free()
