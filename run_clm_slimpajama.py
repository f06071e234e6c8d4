"""Pre-train a GPT-2-style model on SlimPajama, one document per step, everything visible.

    accelerate launch run_clm_slimpajama.py --max_steps 10000
    accelerate launch run_clm_slimpajama.py --config configs/laptop.yaml --seed 1
    python run_clm_slimpajama.py --test
    python run_clm_slimpajama.py --help

This file is the table of contents: each line names the module that does that part of the work.
"""

from __future__ import annotations

from slimpajama_hf import devices, program
from slimpajama_hf.session import command_line


@program.with_an_end
def main(argv: list[str], at_end: program.ExitStack) -> int:
    devices.prepare(*command_line.gpu_asked(argv))
    settings = command_line.parse(argv)

    # The flags are checked before the heavy imports. The heaviest, the Trainer, comes after the corpus has opened.
    from slimpajama_hf import loading, precision, screen

    with loading.libraries("transformers' Trainer and this program's parts"):
        from slimpajama_hf.hub import account, background
        from slimpajama_hf.model import presets
        from slimpajama_hf.record import run_folder
        from slimpajama_hf.samples.encoder import Encoder
        from slimpajama_hf.session import held_out_documents, own_tokenizer, resume, run_record, session
        from slimpajama_hf.training import processes
        from slimpajama_hf.watching import live_page

        screen.quiet_libraries()

    training, data, model = settings.for_trainer(), settings.data, settings.model
    devices.use_one_gpu(training, settings.run.gpu)
    team = processes.join(training)
    destination = team.first_keeps(lambda: account.destination(settings))
    devices.keep_freed_memory()

    # The folder of the run, and the checkpoint that a resumed run goes on from.
    resuming = resume.is_asked(training.resume_from_checkpoint)
    folder = team.first_does(
        lambda: run_folder.prepare(settings.output_dir, at_end, resuming, settings.run.overwrite_output_dir)
    )
    checkpoint = team.first_does(lambda: resume.checkpoint_of(training.resume_from_checkpoint, settings.output_dir))
    live_page.open_if_asked(settings.run.watch and team.is_first, folder, at_end)

    # The corpus (a resumed run reads the one that it recorded), the tokenizer, the samples.
    with screen.Waiting("opening the corpus") as waiting:
        corpus = team.first_does(lambda: resume.corpus_of(settings, folder, waiting))
        waiting("loading the tokenizer and building the model")
        tokenizer_name, tokenizer = own_tokenizer.load(settings, corpus, folder, checkpoint, team, waiting)
        encoder = Encoder(tokenizer)
        config = presets.model_config(model.model, model.config_overrides, tokenizer, data.max_seq_length)
        gpt = presets.build(config, training.seed)
        waiting("loading the Trainer")
        from slimpajama_hf.training.signals import StopSignals
        from slimpajama_hf.training.stopping import StopOnSignal
        from slimpajama_hf.training.trainer import SlimPajamaTrainer
        from slimpajama_hf.watching.watchers import Watchers

        chosen = team.first_does(lambda: resume.precision_of(settings, folder, gpt))
        precision.settle(training, chosen)
        held_out = held_out_documents.during_training(settings, corpus, encoder, folder, training, waiting)

    # Everything is there. From here on the files in the folder change.
    point = team.first_does(lambda: resume.go_on(folder, checkpoint) if resuming else resume.begin(folder))
    record = team.first_does(
        lambda: run_record.record_run(settings, folder, corpus, tokenizer_name, tokenizer, gpt, chosen, point)
    )
    signals = StopSignals()
    stream = resume.stream_of(settings, record, corpus, encoder, team, point, signals)
    recorder = run_record.recorder_of_run(folder, point, presets.vocabulary(tokenizer), team)

    with signals:
        trainer = SlimPajamaTrainer(
            model=gpt,
            args=training,
            processing_class=tokenizer,
            stream=stream,
            recorder=recorder,
            about={"run_id": record["run_id"]},
            held_out=held_out,
            backward=model.backward,
            average_half_life=model.average_weights,
            hidden_optim=model.hidden_optim,
            hidden_rate=model.hidden_rate,
            news=processes.news(team, training, signals),
            lr_find=settings.run.lr_find,
            reduce_dtype=model.reduce_dtype,
        )
        # Callbacks that watch and upload. With several processes only the first has them.
        watchers = Watchers(trainer, settings, folder, encoder, record)
        uploads = background.Uploads(folder, destination, point.step, settings.run.hub_patience, trainer.clock)
        trainer.saving.listeners.append(uploads.saved)
        for callback in [*([*watchers.callbacks, uploads] if team.is_first else []), StopOnSignal(signals)]:
            trainer.add_callback(callback)
        return session.Session(
            settings, trainer, folder, point, signals, watchers, chosen, tokenizer_name, uploads
        ).run()


if __name__ == "__main__":
    program.end(program.run(main))
