"""Schedules against closed forms and torch's own."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from harness.optim import ScheduleSection, learning_rate


def rates(section: ScheduleSection, steps: int, peak: float = 0.7) -> list[float]:
    return [learning_rate(section, peak, step, steps) for step in range(1, steps + 1)]


def test_landmarks_of_every_kind() -> None:
    for kind in ("linear", "cosine", "wsd"):
        course = rates(ScheduleSection(kind=kind, warmup_steps=10, final_fraction=0.1), 100)
        assert course[0] == pytest.approx(0.07)
        assert course[9] == max(course) == 0.7
        assert course[-1] == pytest.approx(0.07)
        assert all(later <= earlier for earlier, later in itertools.pairwise(course[9:]))
    assert set(rates(ScheduleSection(kind="constant"), 50)) == {0.7}
    half = rates(ScheduleSection(kind="cosine", warmup_steps=10, final_fraction=0.0), 110)[59]
    assert half == pytest.approx(0.35)


def test_cosine_and_linear_equal_torch() -> None:
    steps, warmup, peak, final = 57, 7, 0.3, 0.2
    for kind in ("cosine", "linear"):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
        if kind == "cosine":
            after = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warmup, eta_min=peak * final)
        else:
            after = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, final, steps - warmup)
        expected = []
        for _ in range(steps - warmup):
            optimizer.step()
            after.step()
            expected.append(after.get_last_lr()[0])
        section = ScheduleSection(kind=kind, warmup_steps=warmup, final_fraction=final)
        assert rates(section, steps, peak)[warmup:] == pytest.approx(expected, rel=1e-9)


def test_wsd_stays_then_falls() -> None:
    section = ScheduleSection(kind="wsd", warmup_steps=5, decay_steps=20, final_fraction=0.0)
    course = rates(section, 100)
    assert set(course[4:80]) == {0.7}
    assert course[80:] == pytest.approx([0.7 * (1 - x / 20) for x in range(1, 21)])
    rooted = rates(section.model_copy(update={"decay_shape": "sqrt"}), 100)
    assert rooted[80:] == pytest.approx([0.7 * (1 - math.sqrt(x / 20)) for x in range(1, 21)])
    default = rates(ScheduleSection(kind="wsd", final_fraction=0.5), 50)
    assert default[39] == 0.7
    assert default[40] < 0.7, "a fifth of the steps by default"


def test_warmup_as_long_as_the_run() -> None:
    assert rates(ScheduleSection(kind="cosine", warmup_steps=4), 4, 1.0) == [0.25, 0.5, 0.75, 1.0]
