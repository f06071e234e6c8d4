"""Callbacks: each decides when, calls a function, and never raises into the training loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from slimpajama_hf import budget, generation, memory, screen, terminal
from slimpajama_hf.files import GrowingFile
from slimpajama_hf.run_folder import RunFolder
from slimpajama_hf.screen import TrainingBar
from slimpajama_hf.signals import StopSignals
from slimpajama_hf.view_process import ViewProcess

if TYPE_CHECKING:
    from slimpajama_hf.tokenizer import Encoder
    from slimpajama_hf.trainer import SlimPajamaTrainer

#: What a chart takes when none has been drawn yet, seconds of a core: most of it is importing matplotlib.
FIRST_CHART_SECONDS = 1.0
#: What the end takes beside its chart, seconds of a core: the report, and the search index.
END_SECONDS = 0.6
#: Samples may be this far ahead of their share, seconds: a run shows early how it writes.
SAMPLES_AHEAD_SECONDS = 0.25


class ShowProgress(TrainerCallback):
    """The progress bar. Listens to the recorder, so that it shows what the ledger holds."""

    def __init__(self) -> None:
        self.bar: TrainingBar | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = TrainingBar(state.max_steps, state.global_step)

    def on_row(self, row: dict[str, Any]) -> None:
        """A new row of the ledger (null stands for what is not finite)."""
        if self.bar is not None:
            loss = float("nan") if row["loss"] is None else row["loss"]
            self.bar.update(loss, row["accuracy"], row["learning_rate"], row["tokens"], row["step_seconds"])

    def say(self, line: str) -> None:
        if self.bar is not None:
            self.bar.say(line)
        else:
            screen.say(line)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if metrics:
            line = (
                f"held out @ {state.global_step}: loss {metrics['eval_loss']:.4f}, perplexity "
                f"{metrics['eval_perplexity']:.1f}, accuracy {metrics['eval_accuracy']:.1%}, "
                f"{metrics['eval_bits_per_byte']:.4f} bits per byte"
            )
            if "eval_averaged_loss" in metrics:
                line += f"; averaged weights: loss {metrics['eval_averaged_loss']:.4f}"
            self.say(line)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class GenerateSamples(TrainerCallback):
    """Every so many steps the model continues the document of the step, with the weights that scored it.

    Samples are appended to `samples.jsonl`; a generation that fails is recorded as failed.
    """

    def __init__(
        self, folder: RunFolder, encoder: Encoder, interval: int, obeyed: bool, progress: ShowProgress
    ) -> None:
        self.file = GrowingFile(folder.samples)
        self._encoder = encoder
        self._interval, self._obeyed = interval, obeyed
        self._progress = progress
        self.trainer: SlimPajamaTrainer | None = None
        self.seconds = 0.0
        """Time that all samples have taken."""
        self.taken = 0
        self.failures: list[str] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Before the update: the weights are those of checkpoint-<step>, and the document is not learned yet.
        trainer = self.trainer
        if trainer is None or state.global_step % self._interval or not state.is_world_process_zero:
            return
        cost = self.seconds / self.taken if self.taken else 0.0
        if not self._obeyed and not budget.affordable(
            trainer, budget.SAMPLES, self.seconds, cost, advance=SAMPLES_AHEAD_SECONDS
        ):
            return
        before = trainer.clock._now()
        with trainer.clock.paused():
            sample = self._sample(trainer, state.global_step)
            problem = self.file.append(sample)
            if problem is not None:
                self._progress.say(
                    f"not saved: the sample of step {state.global_step} ({problem}); the next one tries again"
                )
        self.seconds += trainer.clock._now() - before
        self.taken += 1

    def _sample(self, trainer: SlimPajamaTrainer, step: int) -> dict[str, Any]:
        """What the model writes after the opening of the step's document, with the accuracy of the step itself."""
        assert trainer.sample is not None
        ids = trainer.sample.input_ids
        prompt = ids[: generation.PROMPT_TOKENS]
        sample: dict[str, Any] = {
            "step": step,
            "input": self._encoder.decode(prompt),
            "output": None,
            "accuracy": trainer.accuracy_now(),
            "domain": trainer.sample.document.domain,
            "input_ids": prompt,
            "output_ids": None,
            # What really follows there, for the reader who compares.
            "continuation": self._encoder.decode(ids[: generation.PROMPT_TOKENS + generation.NEW_TOKENS])[
                len(self._encoder.decode(prompt)) :
            ],
        }
        try:
            with trainer.seeing() as model:
                written = generation.write_after(model, prompt)
            sample["output_ids"] = written
            # Decoded behind its prompt, so that the space between the two is right.
            sample["output"] = self._encoder.decode(prompt + written)[len(sample["input"]) :]
            shown = " → ".join(
                _one_line(terminal.written(sample[part]), width) for part, width in (("input", 60), ("output", 100))
            )
        except Exception as error:
            sample["error"] = memory.in_words(error)
            self.failures.append(f"step {step}: {sample['error']}")
            shown = f"{_one_line(terminal.written(sample['input']), 60)} → failed: {sample['error']}"
        self._progress.say(f"sample @ {step}: {shown}")
        return sample


class DrawViews(TrainerCallback):
    """Every so many steps: metrics JSON, samples JSON and the chart, drawn beside training from the ledger."""

    def __init__(self, views: ViewProcess, interval: int, obeyed: bool) -> None:
        self.views = views
        self._interval, self._obeyed = interval, obeyed
        self._said = False
        self.trainer: SlimPajamaTrainer | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer is None or state.global_step % self._interval or not state.is_world_process_zero:
            return
        if not self._obeyed and not self._affordable(trainer):
            return
        with trainer.clock.paused():
            trainer.recorder.flush()
            self.views.request(state.global_step)
            self._say_errors()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._say_errors()

    def _say_errors(self) -> None:
        """Say once that charts fail, when it begins."""
        self.views.collect()
        if self.views.errors and not self._said and self.trainer is not None:
            self._said = True
            self.trainer.recorder.trouble(f"charts are not being drawn ({self.views.errors[-1]}); training goes on")

    def _affordable(self, trainer: SlimPajamaTrainer) -> bool:
        views = self.views
        views.collect()
        # Once the process is there a chart costs what the last one did; so will the one at the end.
        cost = views.last_cpu_seconds or FIRST_CHART_SECONDS
        return views.waiting == 0 and budget.affordable(
            trainer, budget.CHARTS, views.cpu_seconds, cost, advance=FIRST_CHART_SECONDS, reserved=cost + END_SECONDS
        )


class StopOnSignal(TrainerCallback):
    """Ctrl-C and SIGTERM end the run after the step that is on, with a checkpoint; SIGUSR1 saves one and goes on."""

    def __init__(self, signals: StopSignals) -> None:
        self._signals = signals

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saving = args.save_strategy != "no"
        if self._signals.take_save():
            control.should_save = saving
        if self._signals.to_stop():
            control.should_training_stop = True
            control.should_save = saving


def _one_line(text: str, width: int) -> str:
    line = " ".join(text.split())
    line = "".join(letter if letter.isprintable() else "·" for letter in line)
    return line if len(line) <= width else line[: width - 1] + "…"
