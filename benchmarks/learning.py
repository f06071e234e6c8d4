"""What is learned from so many documents: held-out loss of recipes, over seeds, on one fixed order of the documents.

    python benchmarks/learning.py --dataset 'TRAIN/*.jsonl.zst' --held_out 'HELD_OUT/*.jsonl.zst' --name 'a sample'
    python benchmarks/learning.py ... --arms default stock --seeds 42 43 44 --steps 2000
    python benchmarks/learning.py --name 'a sample' --table        # what is there already, without running anything

Each run is the product itself, with seeing off; an arm is a few of its flags. Averages of the weights ride along on the
same run. A result is one JSON line in benchmarks/results/learning/; what is there is not run again, so that a grid that
was stopped goes on. The held-out documents are dealt out alternately in two parts: choose by `select`, quote `report`.
Losses are nats per predicted token; standard errors are over seeds (none with one seed).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from steps import commit, machine  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "learning"

DROPOUT = "resid_pdrop=0.1,embd_pdrop=0.1,attn_pdrop=0.1"

RATES = (
    "3e-5", "6e-5", "1e-4", "1.5e-4", "2e-4", "3e-4", "4.5e-4", "6e-4", "1.5e-3", "2e-3", "3e-3", "4e-3",
)  # fmt: skip
BATCH_8 = ["--gradient_accumulation_steps", "8"]

#: What each recipe changes of the product's defaults, as flags.
ARMS: dict[str, list[str]] = {
    "default": [],
    # What `Trainer` with `GPT2Config()` does: dropout 0.1, beta2 0.999, clipping at 1.
    "stock": ["--config_overrides", DROPOUT],
    "beta2 0.95": ["--adam_beta2", "0.95"],
    "beta2 0.99": ["--adam_beta2", "0.99"],
    "beta2 0.9999": ["--adam_beta2", "0.9999"],
    **{f"rate {rate}": ["--learning_rate", rate] for rate in RATES},
    **{f"stock, rate {rate}": ["--config_overrides", DROPOUT, "--learning_rate", rate] for rate in RATES},
    # Eight documents a step, as many documents in all.
    **{f"batch 8, rate {rate}": [*BATCH_8, "--learning_rate", rate] for rate in (*RATES, "1e-3")},
    **{
        f"batch 8, beta2 0.95, rate {rate}": [*BATCH_8, "--adam_beta2", "0.95", "--learning_rate", rate]
        for rate in (*RATES, "1e-3")
    },
}

#: Half-lives of the averages of the weights, in documents, and how often they are touched.
HALF_LIVES = (50, 200, 500, 1000, 2000)
DOCUMENTS_BETWEEN_AVERAGES = 5


def one_run(options: argparse.Namespace, arm: str, seed: int) -> dict[str, Any]:
    """Train one arm with one seed in this process; scores of the last weights and of their averages."""
    import torch
    from transformers import TrainerCallback

    import run_clm_slimpajama
    from slimpajama_hf import corpora, session
    from slimpajama_hf.evaluation import score
    from slimpajama_hf.samples import SampleStream
    from slimpajama_hf.tokenizer import Encoder, load_tokenizer

    held: dict[str, Any] = {}
    batch = documents_a_step(arm)
    every = max(1, DOCUMENTS_BETWEEN_AVERAGES // batch)
    steps, warmup = options.steps // batch, options.warmup_steps // batch

    class Average(TrainerCallback):
        """Exponential averages of the weights, from the first touch on."""

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step % every:
                return
            weights = [parameter.detach() for parameter in model.parameters()]
            averages = held.setdefault("averages", {})
            for half_life in HALF_LIVES:
                if half_life not in averages:
                    averages[half_life] = [weight.clone() for weight in weights]
                else:
                    share = 1 - 0.5 ** (every * batch / half_life)
                    torch._foreach_lerp_(averages[half_life], weights, share)

    run = session.Session.run

    def with_averages(self: Any) -> int:
        held["trainer"] = self.trainer
        self.trainer.add_callback(Average())
        return run(self)

    session.Session.run = with_averages  # type: ignore[method-assign]
    never = "1000000000"
    flags = [
        "--dataset", options.dataset, "--tokenizer", "builtin", "--model", "tiny", "--precision", options.precision,
        "--max_steps", str(steps), "--warmup_steps", str(warmup), "--seed", str(seed), "--epochs", "1000",
        "--no-checkpoint", "--viz_interval", never, "--display_samples", never, *ARMS[arm],
    ]  # fmt: skip
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        code = run_clm_slimpajama.main([*flags, "--output_dir", str(Path(folder) / "run")])
    seconds = time.perf_counter() - started
    trainer = held["trainer"]
    if code or trainer.state.global_step < steps:
        raise SystemExit(f"{arm}: {trainer.state.global_step} of {steps} steps were made (exit code {code})")
    encoder = Encoder(load_tokenizer("builtin"))
    stream = SampleStream(corpora.open_corpus(options.held_out), encoder, "truncate", 256)
    documents = [sample for sample, _ in zip(stream, range(options.documents), strict=False)]
    scores = {}
    network = trainer.accelerator.unwrap_model(trainer.model)
    with torch.no_grad():
        for name, weights in {"last": None, **held["averages"]}.items():
            if weights is not None:
                for parameter, weight in zip(network.parameters(), weights, strict=True):
                    parameter.copy_(weight)
            parts = {"select": documents[::2], "report": documents[1::2]}
            found = {part: score(network, each)["all"] for part, each in parts.items()}
            label = name if name == "last" else f"average {name}"
            scores[label] = {
                part: {"loss": each.loss, "bits_per_byte": each.bits_per_byte, "documents": each.samples}
                for part, each in found.items()
            }
    return {"seconds": round(seconds, 1), "scores": scores}


def documents_a_step(arm: str) -> int:
    return 8 if "--gradient_accumulation_steps" in ARMS[arm] else 1


def results_file(options: argparse.Namespace) -> Path:
    return RESULTS / f"{options.name.lower().replace(' ', '-')}.jsonl"


def done(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Results that are there for this corpus, this number of steps and this warm-up."""
    path = results_file(options)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    wanted = (options.steps, options.warmup_steps, options.precision)
    rows = map(json.loads, lines)
    return [row for row in rows if (row["steps"], row["warmup_steps"], row.get("precision", "float32")) == wanted]


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and standard error over seeds of each arm and each kind of weights, on both parts."""
    lines = [
        "| recipe | weights | seeds | select, nats | report, nats | report, bits per byte |",
        "|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        of_arm = [row for row in rows if row["arm"] == arm]
        for weights in of_arm[0]["scores"] if of_arm else ():
            cells = [
                mean_and_error([row["scores"][weights][part][what] for row in of_arm])
                for part, what in (("select", "loss"), ("report", "loss"), ("report", "bits_per_byte"))
            ]
            lines.append(f"| {arm} | {weights} | {len(of_arm)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_and_error(values: list[float]) -> str:
    """`4.316 ± 0.012`: the mean and its standard error; the mean alone of a single value."""
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="documents to learn, as --dataset of the program")
    parser.add_argument("--held_out", help="documents to score, likewise")
    parser.add_argument("--name", required=True, help="what the results call this corpus")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument("--steps", type=int, default=2000, help="of one document; a batch of 8 makes an eighth [2000]")
    parser.add_argument("--warmup_steps", type=int, default=200, help="of one document, likewise [200]")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--documents", type=int, default=300, help="held-out documents scored, half a part [300]")
    parser.add_argument("--table", action="store_true", help="print what is there and stop")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.table and not (options.dataset and options.held_out):
        parser.error("--dataset and --held_out are needed to run anything (or --table, to print what is there)")
    if options.one:
        print(json.dumps(one_run(options, options.arms[0], options.seeds[0])))
        return
    for seed in () if options.table else options.seeds:
        for arm in options.arms:
            if any((row["arm"], row["seed"], row["flags"]) == (arm, seed, ARMS[arm]) for row in done(options)):
                continue
            print(f"{arm}, seed {seed}", file=sys.stderr)
            made = subprocess.run(
                [sys.executable, __file__, "--one", "--dataset", options.dataset, "--held_out", options.held_out,
                 "--name", options.name, "--arms", arm, "--seeds", str(seed), "--steps", str(options.steps),
                 "--warmup_steps", str(options.warmup_steps), "--precision", options.precision,
                 "--documents", str(options.documents)],
                capture_output=True, text=True, cwd=ROOT,
            )  # fmt: skip
            if made.returncode:
                raise SystemExit(f"{arm}, seed {seed} failed:\n{made.stderr}")
            row = {
                "arm": arm, "flags": ARMS[arm], "seed": seed, "steps": options.steps,
                "warmup_steps": options.warmup_steps, "precision": options.precision,
                "corpus": options.name, "model": "tiny",
                "date": time.strftime("%Y-%m-%d"), "commit": commit(), "machine": machine(),
            } | json.loads(made.stdout.splitlines()[-1])  # fmt: skip
            RESULTS.mkdir(parents=True, exist_ok=True)
            with open(results_file(options), "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    print(table(done(options)))


if __name__ == "__main__":
    main()
