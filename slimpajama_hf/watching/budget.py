"""What seeing may take of a run: 5 %, or `LEAST_SECONDS`, so that a run of less than 2 minutes may take more. The first
and the last chart and report are always made.

Each watcher has a share. It gets its money in step with the run, so that the end is seen as often as the beginning,
except for an advance with which it can show something early. Intervals that a user typed do not come here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slimpajama_hf.training.trainer import SlimPajamaTrainer


#: Shares of the training time of a session; 5 % in all with what `noise.py` (1.2 %) and `teaching.py` (0.5 %) take at
#: their fixed steps.
CHARTS, SAMPLES, PASSPORTS, PROMPTS = 0.0125, 0.01, 0.005, 0.005
MEASUREMENTS = 0.017

#: Share of what is asked for here, and what any run may take, however short, seconds: the two are equal at 2 minutes.
#: The JSON files at every interval, and an end that grows with the ledger, ask nobody: they take the rest of the 5 %.
ALL, LEAST_SECONDS = 0.047, 6.0

#: What everything but the charts takes of the time to come: the measurements all of theirs, as their steps are fixed;
#: the others, which have their moments early or yield (samples), half of it.
TO_COME = MEASUREMENTS + (SAMPLES + PASSPORTS + PROMPTS) / 2

#: What the end takes beside its chart, seconds of a core: the report, and the search index.
END_SECONDS = 0.6

#: What a chart takes, seconds of a core, as long as only the first has been drawn, for which matplotlib was imported.
CHART_SECONDS = 0.6


def is_half_decade(step: int) -> bool:
    """Whether `step` is one of 0, 10, 30, 100, 300, 1,000, ...: when something is new at every age of a run."""
    digits = str(step)
    return step == 0 or (step >= 10 and digits[0] in "13" and not digits[1:].strip("0"))


def session_seconds(trainer: SlimPajamaTrainer) -> float:
    """Training time that this session will have taken at its end, seconds, at the pace of the steps so far."""
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

    `advance`: seconds that it may spend before it has them, out of its own share. `reserved`: seconds of its share that
    something at the end of the run will take. `least`: seconds that it may spend in any run, however short.
    """
    expected = session_seconds(trainer)
    whole = share * expected - reserved
    passed = trainer.clock.training_seconds / expected if expected else 0.0
    return spent + next_cost <= max(least, min(advance, whole), whole * passed)


def is_left(
    trainer: SlimPajamaTrainer, spent: float, next_cost: float, reserved: float = CHART_SECONDS + END_SECONDS
) -> bool:
    """Whether `next_cost` seconds are left of what all watchers together may take, when they have taken `spent`, the
    end takes `reserved`, and everything but the charts takes `TO_COME` of the time that is left."""
    expected = session_seconds(trainer)
    to_come = max(expected - trainer.clock.training_seconds, 0.0) * TO_COME
    return spent + next_cost + reserved + to_come <= max(ALL * expected, LEAST_SECONDS)
