"""Limits the time for watching a run: 5 % of it, or `LEAST_SECONDS`, which is more in runs of less than 2 minutes. The
first and the last chart and report are always made.

Each watcher has a share, which becomes available as the run proceeds, so that the end is watched as often as the
beginning. An advance lets it show something early. Intervals that a user typed do not use this budget.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slimpajama_hf.training.trainer import SlimPajamaTrainer


#: Shares of the training time of a session. Together with `noise.py` (1.2 %) and `teaching.py` (0.5 %), whose steps are
#: fixed, they are at most 5 %.
CHARTS, SAMPLES, PASSPORTS, PROMPTS = 0.0125, 0.01, 0.005, 0.005
MEASUREMENTS = 0.017

#: The share that this budget covers, and the seconds that any run may take; the two are equal at 2 minutes. The JSON
#: files at every interval, and the part of the end that grows with the ledger, are outside: the rest of the 5 %.
ALL, LEAST_SECONDS = 0.047, 6.0

#: What everything but the charts is expected to take of the remaining time: all of the measurements' share, because
#: their steps are fixed; half of the others' share, because they are active early or give way (samples).
TO_COME = MEASUREMENTS + (SAMPLES + PASSPORTS + PROMPTS) / 2

#: What the end takes besides its chart, in seconds of a core: the report and the search index.
END_SECONDS = 0.6

#: What a chart is assumed to take, in seconds of a core, until the second: the first also imported matplotlib.
CHART_SECONDS = 0.6


def is_half_decade(step: int) -> bool:
    """Whether `step` is one of 0, 10, 30, 100, 300, 1,000, ...: steps at which a run of any age shows something new."""
    digits = str(step)
    return step == 0 or (step >= 10 and digits[0] in "13" and not digits[1:].strip("0"))


def session_seconds(trainer: SlimPajamaTrainer) -> float:
    """The training time of this session at its end, in seconds, at the pace of the steps so far."""
    done = trainer.steps_of_session
    left = trainer.state.max_steps - trainer.state.global_step
    return trainer.clock.training_seconds * (1 + max(left, 0) / done) if done else 0.0


def affordable(
    trainer: SlimPajamaTrainer,
    share: float,
    spent: float,
    next_cost: float,
    advance: float = 0.0,
    reserved: float = 0.0,
    least: float = 0.0,
) -> bool:
    """Whether a watcher that has `spent` seconds may spend `next_cost` more now.

    `advance`: seconds of its share that it may spend early. `reserved`: seconds of its share for the end of the run.
    `least`: seconds that it may spend in any run, however short.
    """
    expected = session_seconds(trainer)
    whole = share * expected - reserved
    passed = trainer.clock.training_seconds / expected if expected else 0.0
    return spent + next_cost <= max(least, min(advance, whole), whole * passed)


def is_left(
    trainer: SlimPajamaTrainer, spent: float, next_cost: float, reserved: float = CHART_SECONDS + END_SECONDS
) -> bool:
    """Whether all watchers together, after `spent` seconds, may spend `next_cost` more. `reserved` seconds are kept for
    the end, and `TO_COME` of the remaining time for everything but the charts."""
    expected = session_seconds(trainer)
    to_come = max(expected - trainer.clock.training_seconds, 0.0) * TO_COME
    return spent + next_cost + reserved + to_come <= max(ALL * expected, LEAST_SECONDS)
