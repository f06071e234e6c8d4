"""What seeing may take of a run: 5 %. The chart and the report at the end are always made, and there is
always something in it, so that a run of less than a minute takes more.

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
