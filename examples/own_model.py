"""run_clm_slimpajama.py with a model and a callback of one's own: a small Llama, and the loss of every tenth step.

python own_model.py --dataset 'texts/*.jsonl' --output_dir runs/mine --max_steps 1000 --resume_from_checkpoint true
"""

import sys

from slimpajama_hf import TrainingRun, run_program
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, set_seed


class TenthLoss(TrainerCallback):
    """Prints the loss of every tenth step."""

    def __init__(self, trainer):
        trainer.recorder.listeners.append(self.on_row)

    def on_row(self, row):
        if row["step"] % 10 == 0:
            sys.stderr.write(
                f"step {row['step']}: {row['loss']:.3f} nats per token, document {row['shard']} row {row['row']}\n"
            )


def main(argv):
    with TrainingRun(argv) as run:
        corpus = run.open_corpus()
        tokenizer = run.load_tokenizer(corpus)
        set_seed(run.args.seed)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
        stream = run.open_stream(corpus, tokenizer, model)
        trainer = run.make_trainer(model, tokenizer, stream)
        for callback in [*run.callbacks(trainer), TenthLoss(trainer)]:
            trainer.add_callback(callback)
        return run.train(trainer)


if __name__ == "__main__":
    run_program(main)
