"""Schedules against the published table, and against plain arithmetic."""

from __future__ import annotations

import math
import random

import pytest

from harness.config import ConfigError
from harness.model import ModelSection, norm_sites
from harness.normfree import NormRemovalSection, check_schedule
from harness.normfree.adaptive import AdaptiveSchedule
from harness.normfree.config import AdaptiveSection
from harness.normfree.schedule import fixed_events, ramp, removal_order
from harness.settings import Settings
from tests.normfree.configs import load_shipped

# arXiv 2507.02559: layers, then first step and gap of mlp, qk, v; the step of final; and steps released.
PUBLISHED = {
    "gpt2-small": (12, (20, 2), (44, 2), (68, 3), 104, 300),
    "gpt2-medium": (24, (20, 2), (68, 2), (116, 3), 188, 500),
    "gpt2-large": (36, (30, 4), (174, 4), (318, 6), 534, 600),
    "gpt2-xl": (48, (50, 4), (242, 4), (434, 6), 722, 800),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_shipped_schedules_are_the_published_ones(name: str) -> None:
    settings: Settings = load_shipped(name)
    layers, mlp, qk, v, final, steps = PUBLISHED[name]
    assert (settings.model.layers, settings.train.steps) == (layers, steps)
    expected = {"final": final}
    for layer in range(layers):
        for kind, (first, gap) in {"mlp": mlp, "qk": qk, "v": v}.items():
            expected[f"layers.{layer}.{kind}"] = first + gap * layer
    events = fixed_events(norm_sites(settings.model), settings.norm_removal, steps)
    assert {event.site: event.step for event in events} == expected
    assert len(events) == 3 * layers + 1
    assert settings.train.global_batch_size * settings.data.sequence_length == 1 << 19


def section(**changes: object) -> NormRemovalSection:
    times = {kind: {"first": 5 * number + 2, "gap": 2} for number, kind in enumerate(("mlp", "qk", "v", "final"))}
    return NormRemovalSection.model_validate({"enabled": True, "times": times, **changes})


MODEL = ModelSection(family="gpt2", layers=2, hidden_size=16, heads=2, vocab_size=64, max_positions=16)


def test_a_schedule_that_cannot_be_kept_is_refused_in_one_line() -> None:
    check_schedule(section(), MODEL, 17, inside=None)
    with pytest.raises(ConfigError, match=r"times: final would be gone at step 17, after the last one .*16"):
        check_schedule(section(), MODEL, 16, inside=None)
    with pytest.raises(ConfigError, match=r"final would be gone at step 21"):
        check_schedule(section(ramp_steps=5), MODEL, 20, inside=None)
    few = section(times={"mlp": {"first": 3}, "final": {"first": 9}})
    with pytest.raises(ConfigError, match="times: says no time for qk, v"):
        check_schedule(few, MODEL, 100, inside=None)
    adaptive = section(schedule="adaptive", adaptive={"start": 5, "gap": 3})
    check_schedule(adaptive, MODEL, 23, inside=None)
    with pytest.raises(ConfigError, match=r"7 sites cannot go in 22 steps.*last goes at step 23"):
        check_schedule(adaptive, MODEL, 22, inside=None)
    with pytest.raises(ConfigError, match="order: v is missing"):
        check_schedule(section(schedule="adaptive", order=["mlp", "qk", "final"]), MODEL, 100, inside=None)
    with pytest.raises(ConfigError, match="no norms"):
        check_schedule(section(), MODEL.model_copy(update={"norm_free": True}), 100, inside=None)
    with pytest.raises(ConfigError, match=r"injection: cannot be used together with train\.compile"):
        check_schedule(section(injection={"weight": 1.0}), MODEL, 100, inside="train.compile")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"match": "runs/x"}, "match is for controls"),
        ({"control": "aux"}, r"auxiliary\.weight is 0"),
        ({"order": ["mlp", "mlp"]}, "names a kind twice"),
        ({"times": {"mpl": {"first": 3}}}, "mpl"),
        ({"times": {"mlp": {"first": 1}}}, "greater than or equal to 2"),
    ],
)
def test_bad_sections_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        section(**changes)


def test_the_adaptive_order_is_kind_by_kind_and_layer_by_layer() -> None:
    names = removal_order(norm_sites(MODEL), section(order=["v", "mlp", "qk", "final"]))
    layers = [f"layers.{layer}.{kind}" for kind in ("v", "mlp", "qk") for layer in range(2)]
    assert names == [*layers, "final"]


def test_the_ramp_is_a_cosine_from_real_to_frozen() -> None:
    assert [ramp(step, 7, 1) for step in (6, 7, 8)] == [0.0, 1.0, 1.0]
    values = [ramp(step, 10, 8) for step in range(9, 19)]
    expected = [(1 - math.cos(math.pi * min(number, 8) / 8)) / 2 for number in range(10)]
    assert values == pytest.approx(expected)
    assert values[-2] == 1.0  # exactly, in its last step


def drive(schedule: AdaptiveSchedule, losses: list[float], first: int = 1) -> list[int]:
    """The steps in which sites go, with these losses of steps `first` and on."""
    gone = []
    for step, loss in enumerate(losses, first):
        if schedule.is_due(step):
            schedule.remove(step)
            gone.append(step)
        schedule.observe(loss)
    return gone


def test_the_next_site_goes_when_the_loss_is_back() -> None:
    settings = AdaptiveSection(start=4, gap=2, tolerance=0.1, patience=30, window_steps=1)
    losses = [2.0] * 3 + [2.5, 2.4, 2.3, 2.2, 2.05, 2.0] + [2.0] * 3
    # Gone in 4; with a window of one step the mean is the last loss: 2.05 in step 8, so the next one goes in 9.
    assert drive(AdaptiveSchedule(settings, 1), losses)[:2] == [4, 9]


def test_patience_runs_out() -> None:
    settings = AdaptiveSection(start=3, gap=2, tolerance=0.1, patience=7)
    assert drive(AdaptiveSchedule(settings, 1), [2.0] * 2 + [2.9] * 20)[:3] == [3, 10, 17]


def test_no_removal_begins_within_a_ramp() -> None:
    settings = AdaptiveSection(start=3, gap=2, tolerance=9.0)
    assert drive(AdaptiveSchedule(settings, 5), [2.0] * 20)[:3] == [3, 8, 13]


def test_a_spike_is_measured_from_before_the_removal_and_only_for_a_while() -> None:
    schedule = AdaptiveSchedule(AdaptiveSection(start=3, spike=0.5, patience=6), 1)
    assert not schedule.is_spike(2, 99.0)  # nothing was removed
    drive(schedule, [2.0, 2.0, 2.3])
    assert not schedule.is_spike(4, 2.49)
    assert schedule.is_spike(4, 2.51)
    assert schedule.is_spike(4, float("nan"))
    assert schedule.is_spike(8, 2.51)
    assert not schedule.is_spike(9, 2.51)


def test_a_rollback_doubles_the_gap_and_successes_halve_it() -> None:
    settings = AdaptiveSection(start=3, gap=2, tolerance=9.0)
    before = AdaptiveSchedule(settings, 1)
    drive(before, [2.0, 2.0])
    spiked = before.copy()
    drive(spiked, [2.0], first=3)
    before.take_back(2, spiked)  # to step 2, from which on 2 * 2 steps pass
    assert before.rollbacks == 1
    assert drive(before, [2.0] * 20, first=3)[:5] == [7, 11, 13, 15, 17]


def test_an_adaptive_schedule_goes_on_as_if_never_interrupted() -> None:
    settings = AdaptiveSection(start=4, gap=2, tolerance=0.02, patience=9, window_steps=4)
    losses = [random.gauss(2.0, 0.1) for _ in range(60)]
    whole = drive(AdaptiveSchedule(settings, 2), losses)
    cut = random.randrange(5, 55)
    first = AdaptiveSchedule(settings, 2)
    gone = drive(first, losses[:cut])
    second = AdaptiveSchedule(settings, 2)
    second.load_state_dict(first.state_dict())
    assert gone + drive(second, losses[cut:], first=cut + 1) == whole
