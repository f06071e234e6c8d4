"""Pre-train a GPT-2-style model on SlimPajama, one document per step, everything visible.

    accelerate launch run_clm_slimpajama.py --max_steps 10000
    accelerate launch run_clm_slimpajama.py --config configs/laptop.yaml --seed 1
    python run_clm_slimpajama.py --test
    python run_clm_slimpajama.py --help

This file is the table of contents. Each part is a method of `TrainingRun`, which names the modules that do the work
(slimpajama_hf/anywhere/training_run.py). All names are public, so a copy of this file with a model or a callback of
your own is a program of your own (docs/python.md).
"""

from __future__ import annotations

from slimpajama_hf import TrainingRun, run_program


def main(argv: list[str]) -> int:
    # The flags are checked, the other processes met, the folder of the run locked.
    with TrainingRun(argv) as run:
        # A resumed run reads the corpus that it recorded. `--tokenizer corpus:N` trains the tokenizer here.
        corpus = run.open_corpus()
        tokenizer = run.load_tokenizer(corpus)
        model = run.build_model(tokenizer)
        # The samples, from where the run begins or goes on. From here on the files in the folder change.
        stream = run.open_stream(corpus, tokenizer, model)
        # A `transformers.Trainer`, and the callbacks that watch it and upload its checkpoints.
        trainer = run.make_trainer(model, tokenizer, stream)
        for callback in run.callbacks(trainer):
            trainer.add_callback(callback)
        return run.train(trainer)


if __name__ == "__main__":
    run_program(main)
