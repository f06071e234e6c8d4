"""Pre-train a GPT-2-style model on SlimPajama, one document per step, everything visible.

    accelerate launch run_clm_slimpajama.py --max_steps 10000
    accelerate launch run_clm_slimpajama.py --config configs/laptop.yaml --seed 1
    python run_clm_slimpajama.py --test
    python run_clm_slimpajama.py --help

This page is the table of contents: each line names the module where the thing is done.
"""

from __future__ import annotations

from slimpajama_hf import cli, devices


def main(argv: list[str]) -> int:
    devices.refuse_several_processes()
    settings = cli.parse(argv)

    # Heavy imports come after the flags are known to be right; the heaviest, the Trainer, after the corpus has opened.
    from slimpajama_hf import corpora, model, resume, run_folder, session
    from slimpajama_hf.hub import account
    from slimpajama_hf.screen import Waiting
    from slimpajama_hf.tokenizer import Encoder, load_tokenizer

    training, data = settings.training, settings.data
    session.quiet_libraries()
    destination = account.destination(settings)
    devices.choose_gpu(settings.run.gpu)
    devices.keep_freed_memory()

    # Where the run lives, and where it goes on if it goes on.
    resuming = resume.is_asked(training.resume_from_checkpoint)
    folder = run_folder.prepare(settings.output_dir, resume=resuming, overwrite=settings.run.overwrite_output_dir)
    checkpoint = resume.checkpoint_of(training.resume_from_checkpoint, settings.output_dir)

    # The corpus (a resumed run reads the one that it recorded), the tokenizer, the samples.
    with Waiting("opening the corpus") as waiting:
        if resuming and folder.record.is_file():
            corpus = corpora.check_unchanged(corpora.recorded(folder.read_record()["corpus"]), waiting)
        else:
            corpus = corpora.open_corpus(
                data.dataset,
                text_column=data.text_column,
                split=data.dataset_split,
                config_name=data.dataset_config_name,
                revision=data.dataset_revision,
                skip_broken_shards=data.skip_broken_shards,
                waiting=waiting,
            )
        waiting("loading the tokenizer and building the model")
        tokenizer_name = session.tokenizer_name(settings.model.tokenizer, corpus)
        tokenizer = load_tokenizer(tokenizer_name)
        encoder = Encoder(tokenizer)
        config = model.model_config(
            settings.model.model, settings.model.config_overrides, tokenizer, data.max_seq_length
        )
        gpt = model.build(config, training.seed)
        precision = model.choose_precision(settings.model.precision, training.device)
        training.bf16 = precision == "bfloat16"
        waiting("loading the Trainer")
        from slimpajama_hf import evaluation
        from slimpajama_hf.callbacks import StopOnSignal
        from slimpajama_hf.hub.background import Uploads
        from slimpajama_hf.ledger import Ledger
        from slimpajama_hf.recorder import StepRecorder
        from slimpajama_hf.samples import SampleStream
        from slimpajama_hf.signals import StopSignals
        from slimpajama_hf.surprisals import Surprisals
        from slimpajama_hf.trainer import SlimPajamaTrainer
        from slimpajama_hf.watchers import Watchers

        held_out = evaluation.during_training(settings, corpus, encoder, folder)

    # All is there: from here on the folder changes.
    point = resume.go_on(folder, checkpoint) if resuming else resume.begin(folder)
    record = session.record_run(settings, folder, corpus, tokenizer_name, tokenizer, gpt, precision, point)
    stream = SampleStream(
        corpus,
        encoder,
        data.sample_mode,
        data.max_seq_length,
        shuffle_buffer=data.shuffle_buffer,
        seed=training.seed,
        epochs=data.epochs,
        skip_broken_shards=data.skip_broken_shards,
        patience_seconds=data.stream_patience,
        leave_out=data.leave_out or (),
    )
    stream.start = point.cursor

    # What is kept of every step, and what watches.
    surprisals = Surprisals(folder.surprisals, point.predicted)
    recorder = StepRecorder(Ledger(folder.ledger, point.chain), config.vocab_size, point.rows, surprisals)
    watchers = Watchers(settings, folder, encoder, record)
    watchers.listen_to(recorder)
    uploads = Uploads(settings, folder, destination, point.step)

    with StopSignals() as signals:
        stream.stop = lambda: signals.received is not None
        trainer = SlimPajamaTrainer(
            model=gpt,
            args=training,
            processing_class=tokenizer,
            stream=stream,
            recorder=recorder,
            about={"run_id": record["run_id"]},
            callbacks=[*watchers.callbacks, uploads, StopOnSignal(signals)],
            held_out=held_out,
            backward=settings.model.backward,
        )
        watchers.look_at(trainer)
        uploads.trainer = trainer
        return session.Session(
            settings, trainer, folder, point, signals, watchers, precision, tokenizer_name, uploads
        ).run()


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
