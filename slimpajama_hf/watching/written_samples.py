"""Writes `samples.jsonl`: the model continues the document of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from slimpajama_hf import screen, terminal
from slimpajama_hf.files import GrowingFile
from slimpajama_hf.model import generation, memory
from slimpajama_hf.watching import budget

if TYPE_CHECKING:
    from slimpajama_hf.record.run_folder import RunFolder
    from slimpajama_hf.samples.encoder import Encoder
    from slimpajama_hf.training.trainer import SlimPajamaTrainer


#: How many seconds of their share samples may use early, so that a run soon shows how it writes.
SAMPLES_AHEAD_SECONDS = 0.25


class GenerateSamples(TrainerCallback):
    """Has the model continue the documents of some steps, with the weights that scored them: at an interval that was
    typed, or else at steps 0, 10, 30, 100, 300, ... and as often as the budget allows.

    Samples are appended to `samples.jsonl`; a generation that fails is recorded as failed.
    """

    def __init__(
        self,
        trainer: SlimPajamaTrainer,
        folder: RunFolder,
        encoder: Encoder,
        interval: int,
        obeyed: bool,
        seeing_seconds: Callable[[], float],
    ) -> None:
        self._trainer = trainer
        self.file = GrowingFile(folder.samples)
        self._encoder = encoder
        self._interval, self._obeyed = interval, obeyed
        self._seeing_seconds = seeing_seconds
        self.seconds = 0.0
        """Time that all samples have taken."""
        self.taken = 0
        self.failures: list[str] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Before the update: the weights are those of checkpoint-<step>, and the document is not learned yet.
        trainer = self._trainer
        if not state.is_world_process_zero or not self._due(state.global_step):
            return
        with trainer.clock.paused() as pause:
            sample = self._sample(trainer, state.global_step)
            problem = self.file.append(sample)
            if problem is not None:
                screen.say(f"not saved: the sample of step {state.global_step} ({problem}); the next one tries again")
        self.seconds += pause.seconds
        self.taken += 1

    def _due(self, step: int) -> bool:
        """Whether to write a sample at this step. An interval that was typed is obeyed."""
        in_turn = step % self._interval == 0
        if self._obeyed:
            return in_turn
        cost = self.seconds / self.taken if self.taken else 0.0
        early = budget.is_half_decade(step)
        if not early and not (
            in_turn
            and budget.affordable(self._trainer, budget.SAMPLES, self.seconds, cost, advance=SAMPLES_AHEAD_SECONDS)
        ):
            return False
        # The common budget counts too: early charts may have used it.
        return budget.is_left(self._trainer, self._seeing_seconds(), cost)

    def _sample(self, trainer: SlimPajamaTrainer, step: int) -> dict[str, Any]:
        """The model's continuation of the beginning of the step's document, and the accuracy of the step itself."""
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
            # The true continuation, for comparison.
            "continuation": self._encoder.decode(ids[: generation.PROMPT_TOKENS + generation.NEW_TOKENS])[
                len(self._encoder.decode(prompt)) :
            ],
        }
        try:
            with trainer.seeing() as model:
                written = generation.write_after(model, prompt)
            sample["output_ids"] = written
            # Decoded together with its prompt, so that the space between the two is right.
            sample["output"] = self._encoder.decode(prompt + written)[len(sample["input"]) :]
            shown = " → ".join(
                _one_line(terminal.written(sample[part]), width) for part, width in (("input", 60), ("output", 100))
            )
        except Exception as error:
            sample["error"] = memory.in_words(error)
            self.failures.append(f"step {step}: {sample['error']}")
            shown = f"{_one_line(terminal.written(sample['input']), 60)} → failed: {sample['error']}"
        screen.say(f"sample @ {step}: {shown}")
        return sample


def _one_line(text: str, width: int) -> str:
    line = " ".join(text.split())
    line = "".join(letter if letter.isprintable() else "·" for letter in line)
    return line if len(line) <= width else line[: width - 1] + "…"
