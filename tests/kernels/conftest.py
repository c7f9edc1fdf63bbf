"""Fresh random inputs for every run, with the seed in the report of a failure."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from harness.kernels.linear_cross_entropy import blocked, checks, sweep


@pytest.fixture(autouse=True)
def seed() -> Iterator[int]:
    with torch.random.fork_rng():
        value = torch.seed() % 2**31
        torch.manual_seed(value)
        print(f"torch.manual_seed({value})")
        yield value


@pytest.fixture(params=[1, 5, None], ids=lambda tokens: f"chunk={tokens or 'default'}")
def chunk_tokens(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """Tokens a chunk: small problems get several chunks, the last one shorter."""
    if request.param is not None:
        monkeypatch.setattr(sweep, "CPU_CHUNK_BYTES", 1)
        monkeypatch.setattr(sweep, "CPU_CHUNK_TOKENS", (request.param, request.param))
        monkeypatch.setattr(sweep, "ACCELERATOR_CHUNK_BYTES", 1)
        monkeypatch.setattr(sweep, "ACCELERATOR_CHUNK_TOKENS", (request.param, request.param))
    return request.param


@pytest.fixture(params=[True, False], ids=["host", "as_on_a_device"])
def host_sees(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Also runs what is done on devices whose values the host doesn't look at, on the CPU."""
    if not request.param:
        for module in (blocked, checks, sweep):
            monkeypatch.setattr(module, "host_sees", lambda tensor: False)
    return request.param
