"""What TensorBoard and trackio kept of a run, read by themselves."""

import sqlite3
import sys
from importlib.metadata import version
from pathlib import Path

from answers import Answers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

answers = Answers(sys.argv[1])
answers.about |= {name: version(name) for name in ("tensorboard", "trackio")}
run, losses = Path(answers.request["run"]), answers.request["losses"]
with answers.check("tensorboard"):
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    found = events.Scalars("train/loss")
    answers.equal([each.step for each in found], list(range(len(losses))))
    answers.close([each.value for each in found], losses, 1e-5)
with answers.check("trackio"):
    import trackio

    answers.equal([path.stem for path in Path(answers.request["trackio"]).glob("*.db")], [run.name])
    api = trackio.Api()
    runs = list(api.runs(run.name))
    answers.equal(len(runs), 1)
    with sqlite3.connect(Path(answers.request["trackio"]) / f"{run.name}.db") as base:
        answers.equal(base.execute("select count(distinct step) from metrics").fetchone()[0], len(losses))
answers.end()
