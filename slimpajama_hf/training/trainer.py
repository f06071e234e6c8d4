"""`SlimPajamaTrainer`: the step of one document, its schedule, its data loader, and its measurements."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback

from slimpajama_hf import precision
from slimpajama_hf.errors import SaidByTheFirst, UserError
from slimpajama_hf.model import averaging, memory, optimization
from slimpajama_hf.record import noise
from slimpajama_hf.settings.update_rules import UpdateRules
from slimpajama_hf.training import loss_scale, range_test, schedule, step_numbers, stopping
from slimpajama_hf.training.backward import why_autograd, write_out
from slimpajama_hf.training.batches import Batches, collate
from slimpajama_hf.training.checkpointing import Checkpointing
from slimpajama_hf.training.clock import TrainingClock
from slimpajama_hf.training.loss_scale import LossScale
from slimpajama_hf.training.measuring import Measuring
from slimpajama_hf.training.processes import Processes, Weights
from slimpajama_hf.training.recorder import AfterEachStep
from slimpajama_hf.training.saving import Saving
from slimpajama_hf.training.step_numbers import SampleNumbers, Step
from slimpajama_hf.training.update import Update

if TYPE_CHECKING:
    from slimpajama_hf.model.gpt2_step import GPT2Step
    from slimpajama_hf.samples.sample import Sample
    from slimpajama_hf.samples.stream import SampleStream
    from slimpajama_hf.training.evaluation import HeldOutScores
    from slimpajama_hf.training.processes import News
    from slimpajama_hf.training.recorder import StepRecorder
    from slimpajama_hf.training.shared_gradient import SharedGradient


#: Private methods of Trainer that we override or call. A test fails if a signature changes.
PRIVATE_HOOKS = {
    "_clip_grad_norm": "(self, model)",
    "_get_grad_norm": "(self, model, grad_norm=None)",
    "_get_output_dir": "(self, trial)",
    "_load_scaler": "(self, checkpoint)",
    "_save": "(self, output_dir=None, state_dict=None)",
    "_save_checkpoint": "(self, model, trial)",
    "_save_optimizer_and_scheduler": "(self, output_dir)",
}


class SlimPajamaTrainer(Checkpointing):
    """A Trainer whose optimizer step is one streamed document.

    What differs from `transformers.Trainer`: the loss is the mean over the predicted tokens (alone, 5.23 scales GPT-2's
    by (L-1)/L); accuracy is computed from the same logits; every step becomes a row of the ledger; checkpoints are
    staged, given a manifest and renamed; there is no `training_args.bin` (it pickles the Hub token).

    `backward`: `auto` computes the step with `gpt2_step.py` if that can compute the model. Otherwise, and with
    `autograd`, the Trainer computes it.
    """

    def __init__(
        self,
        *,
        stream: SampleStream,
        recorder: StepRecorder,
        about: dict[str, Any],
        callbacks: list[TrainerCallback] | None = None,
        held_out: HeldOutScores | None = None,
        backward: str = "auto",
        average_half_life: float = 0.0,
        rules: UpdateRules | None = None,
        news: News | None = None,
        lr_find: bool = False,
        reduce_dtype: str = "float32",
        **trainer_arguments: Any,
    ) -> None:
        self.stream = stream
        self.team = news.team if news is not None else Processes()
        self.news = news
        """Brings losses together if a step has several samples (`processes.py`); else None."""
        self.recorder = recorder
        self.clock = TrainingClock()
        self.sample: Sample | None = None
        """The sample of the current step."""
        self.cursor = stream.start
        """Where reading goes on after the last trained sample."""
        self.stream_ended = False
        self.steps_of_session, self.skipped_records = 0, Counter[str]()
        """Records passed over in this session, by reason."""
        self.held_out = held_out
        self._correct = self._loss = torch.tensor(0.0)
        self._nats = torch.zeros(0)
        self._weight: Any = None
        """The weight of the current sample in the loss of its step, if that has several samples."""
        self._own: list[tuple[Sample, torch.Tensor]] = []
        """This process' samples of the current step with their packed numbers, if a step has several samples."""
        self._backward, self._reduce_dtype = backward, reduce_dtype
        self._written_out: GPT2Step | None = None
        self._shared: SharedGradient | None = None
        """Sums the gradients of several processes if the step is written out."""
        self._loss_scale: LossScale | None = None
        """What the loss is multiplied by in float16."""
        self.measuring = Measuring(self.clock)
        self._lack = stopping.LackOfMemory()
        self._updating = False
        """Whether the optimizer is at work. If it is interrupted, only some of the weights have moved."""
        self._lr_find = lr_find
        self._average_half_life = average_half_life
        self.average: averaging.WeightAverage | None = None
        """The average of the weights, if one is kept; with several processes the first keeps it."""
        self._resumed_from: Path | None = None
        self._update_skipped = ""
        self.failure: UserError | None = None
        """Why training stopped by itself, if it did."""
        self.computes_in = "unknown"
        """The dtype of the step's products, as seen when training began."""
        self.gradients_summed_by = ""
        """What sums the written-out gradients of several processes, in words; empty for one process, and for DDP."""
        after_each_step = AfterEachStep(
            self.clock, self._begin_training, self._record_step, self.tell_now, self._note_update
        )
        with memory.said("the model was moved to its device"):
            super().__init__(
                train_dataset=Batches(stream),
                eval_dataset=held_out.samples if held_out is not None else None,
                data_collator=collate,
                callbacks=[after_each_step, *(callbacks or [])],
                **trainer_arguments,
            )
        self._weights = Weights(self.team, news.accumulated, self.args.device) if news is not None else None
        if self.args.fp16 and self.args.device.type == "cpu" and self.accelerator.scaler is None:
            # Without a scaler the Trainer would silently compute in float32 here.
            self.accelerator.scaler, self.accelerator.native_amp = loss_scale.for_a_cpu(), True
        self.rules = rules or UpdateRules.of(self.args.optim, "muon", None, "auto")
        self.remove_callback(PrinterCallback)  # we print our own bar and lines
        self.run_path = Path(str(self.args.output_dir))
        self._parameters: int = self.accelerator.unwrap_model(self.model).num_parameters(exclude_embeddings=True)
        self.saving = Saving(self.run_path, recorder, self.team, about, self.args.save_total_limit, self._parameters)

    # ---- data ----

    def get_train_dataloader(self) -> DataLoader:
        """A loader of our stream, one sample per batch, not prepared by accelerate: that would read one sample ahead.

        Without a generator of its own, DataLoader would draw a seed from the global one at each start (torch
        dataloader.py: `_BaseDataLoaderIter`), which would change dropout after a resume.
        """
        return DataLoader(Batches(self.stream), batch_size=1, collate_fn=collate, generator=torch.Generator())

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, None]:
        """The next samples. Each has its own weight, so nothing is counted. Training stops at the end of the stream."""
        batches, ahead = [], self.measuring.ahead
        self.measuring.look_ahead(self.state.global_step, epoch_iterator)
        for _ in range(num_batches):
            try:
                batches.append(ahead.popleft() if ahead else next(epoch_iterator))
            except StopIteration:
                self.stream_ended = True
                self.control.should_training_stop = True
                break
        if self._weights is not None and batches:
            self._weights.begin([batch["sample"] for batch in batches])
        return batches, None

    # ---- the step ----

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As in transformers, except that hidden matrices and embeddings learn in their own way (`optimization.py`)."""
        there = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if there:
            return optimizer
        # Muon's matrices are only orthogonal up to a factor of 2: `--precision float32` need not make them exact.
        fast = precision.choose("auto", self.args.device)
        network: Any = model if model is not None else self.model
        self.optimizer = optimization.with_rules(
            optimizer,
            network,
            self.rules,
            torch.bfloat16 if fast == "bfloat16" else torch.float32,
            self.args.world_size * self.args.gradient_accumulation_steps,
            self.args.world_size,
        )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """Linear warm-up, then constant. The first step trains at lr/warmup, where transformers' would train at 0."""
        if self.lr_scheduler is None:
            own, warmup = self.args.learning_rate, self.args.get_warmup_steps(num_training_steps)

            def share(step: int) -> float:
                if self._lr_find:
                    return range_test.rate(step, num_training_steps) / own
                return schedule.get_learning_rate(step, 1.0, warmup)

            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, share)  # type: ignore[arg-type]
            self._created_lr_scheduler = True
            self._chosen = schedule.chosen(self.lr_scheduler)
        return self.lr_scheduler

    def why_autograd(self) -> str | None:
        """Why autograd computes the step, in words; None if the step is written out (`gpt2_step.py`)."""
        return why_autograd(self.args, self.accelerator.unwrap_model(self.model), self._backward)

    @contextlib.contextmanager
    def seeing(self) -> Iterator[Any]:
        """Context with the model for samples, passports and scores: in float32, but a sharded one as it trains."""
        model = self.accelerator.unwrap_model(self.model)
        if self.is_fsdp_enabled:
            yield model
        else:
            with precision.of_the_weights(model):
                yield model

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. A checkpoint's average of the weights goes on too. Raises UserError if memory runs
        out."""
        self._resumed_from = Path(resume_from_checkpoint) if isinstance(resume_from_checkpoint, str) else None
        if self.team.world_size > 1 and self.why_autograd() is None:
            # The model is not wrapped in DDP: `SharedGradient` sums the gradients.
            self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)
        try:
            outcome = super().train(resume_from_checkpoint, *args, **kwargs)
            self.saving.wait()
            return outcome
        except Exception as error:
            if isinstance(error, UserError) or not memory.is_out(error):
                raise
        # Outside of the `except` block, so that what the exception refers to is freed.
        memory.give_back()
        raise UserError(stopping.memory_ended(self.state.global_step, self.saving.finished(), self._updating))

    def _note_update(self, begins: bool) -> None:
        self._updating = begins

    def _begin_training(self) -> None:
        """Prepare the step, once weights are loaded and the optimizer is there."""
        self.measuring.on(self.args.device)
        assert isinstance(self.lr_scheduler, LambdaLR)
        schedule.choose_again(self.lr_scheduler, self._chosen)
        # With several processes the first keeps the average. With a sharded model no process has all weights.
        if self._average_half_life and self.team.is_first and not self.is_fsdp_enabled:
            model = self.accelerator.unwrap_model(self.model)
            self.average = averaging.begin(model, self._average_half_life, self._resumed_from)
        if self.accelerator.scaler is not None:
            self._loss_scale = LossScale(self.accelerator.scaler, self.args.device)
            # The trainer does what accelerate would do around the optimizer's step (loss_scale.py says why).
            self.optimizer.scaler = None  # type: ignore[union-attr]
        # Without accelerate's wrapper.
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        if self.why_autograd() is None:
            model = self.accelerator.unwrap_model(self.model)
            self.recorder.layers = [noise.layer_of(name) for name, _ in model.named_parameters()]
            self._written_out, self._shared = write_out(
                model, self.args, self.stream.max_length, optimizer, self._loss_scale, self._reduce_dtype
            )
            if self._shared is not None:
                self.gradients_summed_by = self._shared.summed_by
            else:
                whole = self.stream.mode != "pack"
                self.measuring.begin(self._written_out, self.args.max_grad_norm, self._loss_scale, whole)
        self.update = Update(optimizer, self._written_out, self._loss_scale)
        step = self._written_out
        by_hook = functools.partial(precision.seen_in, self.model, min(8, self.stream.max_length), self.args.device)
        self.computes_in = step.computes_in() if step is not None else by_hook()
        precision.refuse_another(self.args.mixed_precision, self.computes_in)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward on one sample; returns its loss, nats per token, on the device."""
        sample: Sample = inputs.pop("sample")
        self._weight = self._weights.of(sample) if self._weights is not None else None
        self._update_skipped = ""
        self.measuring.forget()
        out_of_memory = False
        try:
            if self._written_out is not None:
                # Ids on the host: the step copies what it needs, and labels are the ids.
                ids, step, shared = inputs["input_ids"][0], self.state.global_step, self._shared
                result = shared(ids, self._weight) if shared else self.measuring.gradient(step, ids)
                self._loss, self._correct, self._nats = result.loss, result.correct, result.nats
            else:
                super().training_step(model, inputs, num_items_in_batch)
        except Exception as error:
            if not memory.is_out(error):
                raise
            out_of_memory = True
        if out_of_memory:
            # Here the exception is gone, and with it what it referred to.
            self._loss = self._without_memory(sample)
        if self.news is not None:
            self._own.append((sample, self._of_sample(sample)))
            if len(self._own) > 1:
                # Callbacks see the first sample of the step.
                return self._loss
        self.sample = sample
        return self._loss

    def _of_sample(self, sample: Sample) -> torch.Tensor:
        return SampleNumbers.pack(self._loss, self._correct, self._nats[: sample.predicted])

    def _without_memory(self, sample: Sample) -> torch.Tensor:
        """Give up the current sample, which did not fit into memory; its loss is NaN. May raise UserError."""
        self.model.zero_grad(set_to_none=True)  # type: ignore[union-attr]
        memory.give_back()
        self._lack.of(self.state.global_step, sample, may_skip=self.news is None)
        self._update_skipped = "out of memory"
        self._correct = torch.zeros((), device=self.args.device)
        self._nats = torch.full((sample.predicted,), float("nan"), device=self.args.device)
        return torch.full((), float("nan"), device=self.args.device)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean cross-entropy of the predicted tokens, times the sample's weight in its step. Keeps the mean, the nats
        of each token, and how many were right."""
        outputs = model(input_ids=inputs["input_ids"], use_cache=False)
        logits, targets = outputs.logits[0, :-1].float(), inputs["labels"][0, 1:]  # (T-1, V), (T-1,)
        nats = F.cross_entropy(logits, targets, reduction="none")  # (T-1,)
        loss = nats.mean()
        with torch.no_grad():
            self._loss, self._nats = loss.detach(), nats.detach()
            self._correct = (logits.argmax(dim=-1) == targets).sum()
        if self._weight is not None:
            loss = loss * self._weight
        return (loss, outputs) if return_outputs else loss

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        written_out = self._written_out is not None
        return self.update.clip(self.args.max_grad_norm) if written_out else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if grad_norm is None and self._written_out is not None:
            grad_norm = self.update.leave_unclipped()
        norm = super()._get_grad_norm(model, grad_norm)
        # With several samples this loss is this process' own, but all processes must decide alike.
        self.update.decide(norm, self._loss, loss_decides=self.news is None, was_computed=not self._update_skipped)
        return norm

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """6 x tokens x parameters, without a walk over the modules at every step."""
        return 6 * inputs["input_ids"].numel() * self._parameters

    def accuracy_now(self) -> float:
        """Next-token accuracy of the current step's first sample, a fraction; waits for the device."""
        assert self.sample is not None
        correct = self._own[0][1][1] if self._own else self._correct
        return correct.item() / self.sample.predicted

    def _record_step(self) -> bool:
        """Give the finished step to the recorder. Returns False if the run must stop."""
        assert self.sample is not None
        self.cursor = self.sample.after
        self.saving.look()
        self.steps_of_session += 1
        step = self.state.global_step - 1
        self.measuring.after(step, self.sample, self.update.not_finite)
        if self.average is not None:
            self.average.step(step + 1)
        numbers = self.measuring.numbers
        numbers.grad_norm, numbers.not_finite = self.update.grad_norm, self.update.not_finite
        if numbers.meanings():  # because unwrapping the model takes time
            numbers.measure(self.accelerator.unwrap_model(self.model))
        finished = Step(step, self.sample, self.update.rate, self.clock.lap(), self._update_skipped)
        if self.news is not None:
            self._take_in(self.news.add(finished, self._own, numbers))
            self._own = []
            return not self.news.failed
        self.skipped_records.update(self.sample.skipped)
        own = self._of_sample(self.sample)
        self.recorder.add(finished, step_numbers.pack(numbers, [own], self.measuring.noise_by_parameter))
        self._look_at_what_is_not_finite()
        return self.failure is None

    def tell_now(self) -> None:
        """Exchange outstanding news; all processes must call this at the same step."""
        if self.news is not None:
            self._take_in(self.news.tell())

    def _take_in(self, told: list[Step]) -> None:
        for step in told:
            self.skipped_records.update(step.sample.skipped)
            self.recorder.record(step)
        self._look_at_what_is_not_finite()
        assert self.news is not None
        # Told with the next news, so that all processes stop after the same step.
        self.news.failing = self.failure is not None
        if self.news.failed and self.failure is None:
            self.failure = SaidByTheFirst("the first process stops the run")

    def _look_at_what_is_not_finite(self) -> None:
        if self.failure is None:
            self.failure = stopping.weights_are_lost(self.recorder.not_finite, self.saving.finished, self._loss_scale)

    # ---- evaluation ----

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Scores on held-out documents (`evaluation.py`), with the training clock paused."""
        if self.held_out is None:
            raise ValueError("no held-out documents were given to this trainer")
        scores, must = functools.partial(self.held_out, self), self.args.metric_for_best_model is not None

        def scores_if_they_fit() -> dict[str, float]:
            return self.measuring.unless_out_of_memory(self.state.global_step, "evaluation", scores) or {}

        with self.clock.paused("scoring"):
            # A sharded model computes in all processes together.
            metrics = scores() if self.is_fsdp_enabled else self.team.first_does(scores if must else scores_if_they_fit)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
