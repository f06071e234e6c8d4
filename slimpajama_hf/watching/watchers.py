"""All watchers of a run: bar, samples, passports, prompts, charts, report and trackers. They do not affect training.

To add one, write a callback, make it in `Watchers` and list it in `callbacks`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slimpajama_hf import devices
from slimpajama_hf.settings import training_arguments
from slimpajama_hf.views import views
from slimpajama_hf.watching import notebook
from slimpajama_hf.watching.drawing import DrawViews
from slimpajama_hf.watching.live_page import MeasureArithmetic
from slimpajama_hf.watching.notebook import NotebookDisplay
from slimpajama_hf.watching.passports import SamplePassports
from slimpajama_hf.watching.progress import ShowProgress
from slimpajama_hf.watching.prompts import FixedPrompts
from slimpajama_hf.watching.trackers import Trackers
from slimpajama_hf.watching.view_process import ViewProcess
from slimpajama_hf.watching.written_samples import GenerateSamples

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from slimpajama_hf.record.run_folder import RunFolder
    from slimpajama_hf.samples.encoder import Encoder
    from slimpajama_hf.settings.settings import Settings
    from slimpajama_hf.training.recorder import StepRecorder
    from slimpajama_hf.training.trainer import SlimPajamaTrainer


class Watchers:
    """The watchers of one run, and what they cost. Intervals that the user typed are obeyed."""

    def __init__(
        self,
        trainer: SlimPajamaTrainer,
        settings: Settings,
        folder: RunFolder,
        encoder: Encoder,
        record: dict[str, Any],
    ) -> None:
        self._trainer = trainer
        run, typed = settings.run, settings.typed
        # `--lr_find` sets both intervals to 0, because only its curve is of interest.
        self._asks = not devices.is_sharded() and run.display_samples > 0
        self.draws = run.viz_interval > 0
        self.progress = ShowProgress(has_bar=not notebook.is_here())
        self.notebook = [NotebookDisplay(folder)] if notebook.is_here() else []
        self._measuring = trainer.measuring

        def taken() -> float:
            return self.seconds

        obeyed = "display_samples" in typed
        self.samples = GenerateSamples(trainer, folder, encoder, run.display_samples, obeyed, taken)
        self.passports = SamplePassports(trainer, folder, encoder, taken)
        self.prompts = FixedPrompts(trainer, folder, encoder, taken)
        self.views = ViewProcess(folder, *views.caption_of(record), max_steps=settings.training.max_steps)
        self.drawing = DrawViews(trainer, self.views, run.viz_interval, "viz_interval" in typed, taken)
        names, first = training_arguments.asked(settings.training.report_to), record["sessions"][-1]["step"]
        self.arithmetic = [MeasureArithmetic(trainer, folder, record["model"]["precision"])] if run.watch else []
        # Runs that began before projects had names of their own stay in transformers' default project.
        given = str(settings.training.project)
        project = given if "project" in typed else record.get("tracker_project", given)
        self.trackers = Trackers(names, folder, record["run_id"], first, trainer.recorder.flush, project)

    @property
    def callbacks(self) -> list[TrainerCallback]:
        """The watchers, in the order in which they see a step."""
        # A sharded model computes in all processes together, so the first alone cannot generate or score.
        asking = [self.passports, self.prompts, self.samples] if self._asks else []
        drawing = [self.drawing] if self.draws else []
        return [*asking, *drawing, self.trackers, self.progress, *self.notebook, *self.arithmetic]

    def listen_to(self, recorder: StepRecorder) -> None:
        """Receive the rows of the ledger from now on."""
        passports = [self.passports.on_row] if self._asks else []
        recorder.listeners += [self.progress.on_row, *passports, self.trackers.on_row]
        recorder.listeners += [each.on_row for each in self.notebook]

    @property
    def seconds(self) -> float:
        """What all watchers have taken: time beside training, with that of the measurements, and processor time of the
        drawing process."""
        beside = self.samples.seconds + self.passports.seconds + self.prompts.seconds + self._measuring.seconds
        return beside + self.views.cpu_seconds

    def show_end(self) -> None:
        """Show the last row and the last chart in displays that are redrawn in place."""
        for each in self.notebook:
            each.draw()

    def flush(self) -> str | None:
        """End what is in progress and write what the disk has not taken. Returns why that failed, or None."""
        self.trackers.close()
        growing = [self.samples.file, self.passports.file, self.prompts.file]
        if self._trainer.held_out is not None:
            growing.append(self._trainer.held_out.file)
        problems = [file.flush() for file in growing]
        return next((problem for problem in problems if problem), None)
