"""What seeing may take of a run, counted on runs of every length."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from slimpajama_hf.watching import budget

STEP_SECONDS = 0.04


def spent_by(steps: int, cost: float, interval: int, **terms: Any) -> list[int]:
    """The steps at which a watcher acts whose every look costs `cost` seconds, in a run of `steps`."""
    acted: list[int] = []
    for step in range(steps):
        trainer: Any = SimpleNamespace(
            steps_of_session=step,
            state=SimpleNamespace(global_step=step, max_steps=steps),
            clock=SimpleNamespace(training_seconds=step * STEP_SECONDS),
        )
        if step % interval == 0 and budget.affordable(trainer, 0.02, cost * len(acted), cost, **terms):
            acted.append(step)
    return acted


@pytest.mark.parametrize("steps", [100, 700, 1_500, 10_000, 50_000])
@pytest.mark.parametrize("cost", [0.01, 0.1, 0.4])
@pytest.mark.parametrize("terms", [{}, {"advance": 0.5}, {"advance": 0.4, "reserved": 0.4}])
def test_it_never_takes_more_than_its_share(steps, cost, terms):
    acted = spent_by(steps, cost, 5, **terms)
    assert cost * len(acted) + terms.get("reserved", 0.0) <= max(0.02 * steps * STEP_SECONDS, terms.get("reserved", 0))


def test_it_is_spread_over_the_run():
    acted = spent_by(50_000, 0.4, 50, advance=0.4)
    quarters = [sum(lower <= step < lower + 12_500 for step in acted) for lower in range(0, 50_000, 12_500)]
    assert min(quarters) > 20 and max(quarters) <= min(quarters) + 1


def test_an_advance_shows_something_early():
    assert spent_by(50_000, 0.4, 50, advance=0.4)[0] == 50
    assert spent_by(50_000, 0.4, 50)[0] >= 0.4 / 0.02 / STEP_SECONDS


def test_the_shortest_run_has_something_to_show():
    assert len(spent_by(20, 0.02, 1, least=0.1)) == 5 and not spent_by(20, 0.02, 1)


def test_what_the_end_will_take_is_kept_back():
    with_it, without = (len(spent_by(10_000, 0.4, 50, reserved=reserved)) for reserved in (4.0, 0.0))
    assert without - with_it == 10


def test_a_run_that_goes_on_has_the_time_that_is_left():
    trainer: Any = SimpleNamespace(
        steps_of_session=10,
        state=SimpleNamespace(global_step=910, max_steps=1000),
        clock=SimpleNamespace(training_seconds=1.0),
    )
    assert budget.session_seconds(trainer) == pytest.approx(10.0)


@pytest.mark.parametrize(("steps", "early"), [(1_500, 3), (3_000, 0), (10_000, 6), (100_000, 8)])
def test_early_charts_leave_the_whole_within_its_limit(steps, early):
    """Charts at 10, 30, 100, ... of runs of 1 minute, 2 minutes, 7 minutes and an hour, where the other watchers take
    what is expected of them."""
    cost, spent, acted = 0.6, 1.3, []  # the first chart has to import matplotlib
    others = budget.TO_COME
    for step in range(1, steps):
        if not budget.is_half_decade(step):
            continue
        trainer: Any = SimpleNamespace(
            steps_of_session=step,
            state=SimpleNamespace(global_step=step, max_steps=steps),
            clock=SimpleNamespace(training_seconds=step * STEP_SECONDS),
        )
        taken = others * step * STEP_SECONDS
        if budget.is_left(trainer, spent + taken, cost, reserved=cost + budget.END_SECONDS):
            acted.append(step)
            spent += cost
    assert acted == [10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000][: len(acted)] and len(acted) == early
    whole = steps * STEP_SECONDS
    always = 1.3 + cost + budget.END_SECONDS + others * whole
    together = spent + others * whole + cost + budget.END_SECONDS
    assert together <= max(budget.ALL * whole, budget.LEAST_SECONDS, always)


def test_half_decades():
    assert [step for step in range(2_000) if budget.is_half_decade(step)] == [0, 10, 30, 100, 300, 1_000]
