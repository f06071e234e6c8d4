"""`TrainingRun`: one start of `run_clm_slimpajama.py`, part by part, for copies of that script."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from slimpajama_hf import devices
from slimpajama_hf.session import command_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from slimpajama_hf.corpus.corpus import Corpus
    from slimpajama_hf.samples.stream import SampleStream
    from slimpajama_hf.session.initial_embeddings import InitialEmbeddings
    from slimpajama_hf.training.trainer import SlimPajamaTrainer


class TrainingRun:
    """One start of the program: a run that begins, or goes on from a checkpoint.

        with TrainingRun(sys.argv[1:]) as run:
            corpus = run.open_corpus()
            tokenizer = run.load_tokenizer(corpus)
            model = run.build_model(tokenizer)
            stream = run.open_stream(corpus, tokenizer, model)
            trainer = run.make_trainer(model, tokenizer, stream)
            for callback in run.callbacks(trainer):
                trainer.add_callback(callback)
            code = run.train(trainer)

    `argv`: flags of `run_clm_slimpajama.py`. The methods are called in this order. A copy of that script can train a
    model of its own, and add callbacks; a resumed run must be given the same model. `settings`: what the flags say,
    checked. `args`: the `TrainingArguments` of the Trainer.

    Entering it checks the flags, joins the other processes of the launcher, and locks the folder of the run. Leaving it
    gives all of that back, however training ended. Raises UserError, UsageError for the flags, with one sentence for
    what a user can mend.
    """

    def __init__(self, argv: Sequence[str]) -> None:
        self._argv = list(argv)
        self._built: Any = None
        self._embeddings: InitialEmbeddings | None = None
        self._at_end = contextlib.ExitStack()

    def __enter__(self) -> TrainingRun:
        with contextlib.ExitStack() as at_end:
            self._begin(at_end)
            self._at_end = at_end.pop_all()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._at_end.__exit__(*raised)

    def _begin(self, at_end: contextlib.ExitStack) -> None:
        devices.prepare(*command_line.gpu_asked(self._argv))
        self.settings = settings = command_line.parse(self._argv)

        # The flags are checked before the heavy imports. The heaviest, the Trainer, comes after the corpus has opened.
        from slimpajama_hf import loading, screen

        with loading.libraries("transformers' Trainer and this program's parts"):
            from slimpajama_hf.hub import account
            from slimpajama_hf.record import run_folder
            from slimpajama_hf.session import resume
            from slimpajama_hf.training import processes
            from slimpajama_hf.watching import live_page

            screen.quiet_libraries()

        self.args = training = settings.for_trainer()
        devices.use_one_gpu(training, settings.run.gpu)
        self._team = team = processes.join(training)
        self._destination = team.first_keeps(lambda: account.destination(settings))
        devices.keep_freed_memory()

        # The folder of the run, and the checkpoint that a resumed run goes on from.
        asked = training.resume_from_checkpoint
        self._resuming = resume.is_asked(asked)
        self._folder = team.first_does(
            lambda: run_folder.prepare(settings.output_dir, at_end, self._resuming, settings.run.overwrite_output_dir)
        )
        self._checkpoint = team.first_does(lambda: resume.checkpoint_of(asked, settings.output_dir))
        live_page.open_if_asked(settings.run.watch and team.is_first, self._folder, at_end)
        # Until the stream is open.
        self._opening = at_end.enter_context(contextlib.ExitStack())
        self._waiting = self._opening.enter_context(screen.Waiting("opening the corpus"))

    def open_corpus(self) -> Corpus:
        """The corpus of `--dataset`; a resumed run reads the one that it recorded."""
        from slimpajama_hf.session import resume

        self._corpus = self._team.first_does(lambda: resume.corpus_of(self.settings, self._folder, self._waiting))
        return self._corpus

    def load_tokenizer(self, corpus: Corpus) -> PreTrainedTokenizerBase:
        """The tokenizer of `--tokenizer`, which may be trained on `corpus`."""
        from slimpajama_hf.samples.encoder import Encoder
        from slimpajama_hf.session import own_tokenizer

        self._waiting("loading the tokenizer and building the model")
        self._tokenizer_name, tokenizer = own_tokenizer.load(
            self.settings, corpus, self._folder, self._checkpoint, self._team, self._waiting
        )
        self._encoder = Encoder(tokenizer)
        return tokenizer

    def build_model(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """The model of `--model` and `--config_overrides`, with fresh weights in float32: drawn from `--seed`, but the
        embeddings as `--init_embeddings` says."""
        from slimpajama_hf.model import presets
        from slimpajama_hf.session import initial_embeddings

        asked, data = self.settings.model, self.settings.data
        config = presets.model_config(asked.model, asked.config_overrides, tokenizer, data.max_seq_length)
        self._built = model = presets.build(config, self.args.seed)
        if self._checkpoint is None:
            self._embeddings = initial_embeddings.of_run(
                self.settings, self._corpus, self._encoder, self._tokenizer_name, self._folder, model, self._resuming,
                self._team, self._waiting,
            )  # fmt: skip
        return model

    def open_stream(self, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> SampleStream:
        """The samples from where the run begins or goes on. From here on the files in the folder change: records are
        cut back to the checkpoint, and `run.json` is written."""
        self._waiting("loading the Trainer")
        from slimpajama_hf import precision
        from slimpajama_hf.model import presets
        from slimpajama_hf.session import held_out_documents, resume, run_record
        from slimpajama_hf.training.signals import StopSignals
        from slimpajama_hf.training.trainer import SlimPajamaTrainer

        self._trainer_class = SlimPajamaTrainer
        if model is not self._built:
            presets.prepare(model)
            # What the screen and the record say of the model.
            own = {"model": type(model).__name__, "config_overrides": None, "init_embeddings": "random"}
            self.settings, self._embeddings = self.settings.changed(model=own), None
        settings, team, folder = self.settings, self._team, self._folder
        self._precision = team.first_does(lambda: resume.precision_of(settings, folder, model))
        precision.settle(self.args, self._precision)
        self._held_out = held_out_documents.during_training(
            settings, corpus, self._encoder, folder, self.args, self._waiting
        )
        self._opening.close()
        self._point = team.first_does(
            lambda: resume.go_on(folder, self._checkpoint) if self._resuming else resume.begin(folder)
        )
        self._record = team.first_does(
            lambda: run_record.record_run(
                settings, folder, corpus, self._tokenizer_name, tokenizer, model, self._precision, self._point,
                self._embeddings,
            )
        )  # fmt: skip
        self._signals = StopSignals()
        self._recorder = run_record.recorder_of_run(folder, self._point, presets.vocabulary(tokenizer), team)
        stream = resume.stream_of(settings, self._record, corpus, self._encoder, team, self._point, self._signals)
        self._at_end.enter_context(self._signals)
        return stream

    def make_trainer(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stream: SampleStream
    ) -> SlimPajamaTrainer:
        """The `Trainer` that learns one sample a step and records it."""
        from slimpajama_hf.training import processes

        asked = self.settings.model
        return self._trainer_class(
            model=model,
            args=self.args,
            processing_class=tokenizer,
            stream=stream,
            recorder=self._recorder,
            about={"run_id": self._record["run_id"]},
            held_out=self._held_out,
            backward=asked.backward,
            average_half_life=asked.average_weights,
            rules=self.settings.rules,
            news=processes.news(self._team, self.args, self._signals),
            lr_find=self.settings.run.lr_find,
            reduce_dtype=asked.reduce_dtype,
        )

    def callbacks(self, trainer: SlimPajamaTrainer) -> list[TrainerCallback]:
        """Bar, samples, charts, trackers, uploads and what stops a run on a signal. With several processes only the
        first watches and uploads."""
        from slimpajama_hf.hub import background
        from slimpajama_hf.training.stopping import StopOnSignal
        from slimpajama_hf.watching.watchers import Watchers

        self._watchers = Watchers(trainer, self.settings, self._folder, self._encoder, self._record)
        self._uploads = background.Uploads(
            self._folder, self._destination, self._point.step, self.settings.run.hub_patience, trainer.clock
        )
        trainer.saving.listeners.append(self._uploads.saved)
        watching = [*self._watchers.callbacks, self._uploads] if self._team.is_first else []
        return [*watching, StopOnSignal(self._signals)]

    def train(self, trainer: SlimPajamaTrainer) -> int:
        """Train to the end, to a signal or to an error; leaves a checkpoint, charts and a summary. Returns the exit
        code."""
        from slimpajama_hf.session.session import Session

        return Session(
            self.settings, trainer, self._folder, self._point, self._signals, self._watchers, self._precision,
            self._tokenizer_name, self._uploads,
        ).run()  # fmt: skip
