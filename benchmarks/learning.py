"""What is learned from so many documents: held-out loss of recipes, over seeds, on one fixed order of the documents.

    python benchmarks/learning.py --dataset 'TRAIN/*.jsonl.zst' --held_out 'HELD_OUT/*.jsonl.zst' --name 'a sample'
    python benchmarks/learning.py ... --arms default stock --seeds 42 43 44 --steps 2000 --jobs 2
    python benchmarks/learning.py ... --cut 800                    # a small sample: one pass over pieces of documents
    python benchmarks/learning.py --name 'a sample' --table        # what is there already, without running anything
    python benchmarks/learning.py --name 'a sample' --plot FILE.png

Each run is the product itself, with seeing off; an arm is a few of its flags. Averages of the weights ride along on the
same run. A result is one JSON line in benchmarks/results/learning/; what is there is not run again, so that a grid that
was stopped goes on. The held-out documents are dealt out alternately in two parts: choose by `select`, quote `report`.
Losses are nats per predicted token; standard errors are over seeds (none with one seed).

A run of this project sees no document twice. Where a sample has fewer documents than a run has steps, `--cut N` cuts
them into pieces of N characters (at most `MOST_PIECES` of one document), each a document of its own, in one seeded
order. Held-out documents give their first `HELD_OUT_PIECES`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from steps import commit, machine  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "learning"

DROPOUT = "resid_pdrop=0.1,embd_pdrop=0.1,attn_pdrop=0.1"

#: With the default, 1e-3, the twelve rates of a sweep.
RATES = ("5e-5", "1e-4", "1.5e-4", "2e-4", "3e-4", "4e-4", "5e-4", "7e-4", "1.5e-3", "2e-3", "3e-3")
RATES_OF_8 = ("5e-4", "1e-3", "1.5e-3", "2e-3", "3e-3", "4e-3", "8e-3", "1.2e-2")
ADAMW = ["--hidden_optim", "adamw"]
ONE_RATE = [*ADAMW, "--hidden_rate", "1"]
NARROW = ["--config_overrides", "n_embd=128"]
BATCH_8 = ["--gradient_accumulation_steps", "8"]

#: What each recipe changes of the product's defaults, as flags.
ARMS: dict[str, list[str]] = {
    "default": [],
    # What `Trainer` with `GPT2Config()` does: dropout 0.1, beta2 0.999, clipping at 1, one rate for all.
    "stock": ["--config_overrides", DROPOUT, *ONE_RATE],
    # That without dropout, for one pass over the documents; a sweep of its rate.
    "plain": ONE_RATE,
    **{f"plain, rate {rate}": [*ONE_RATE, "--learning_rate", rate] for rate in RATES},
    # AdamW for all, but the matrices in the blocks at a tenth of the rate.
    "adamw": ADAMW,
    # Lighter optimizers for everything, at the rates of Marek et al. 2025 (arXiv 2507.07101).
    "sgd, rate 0.2": ["--optim", "sgd", "--learning_rate", "0.2"],
    "adafactor, rate 5e-3": ["--optim", "adafactor", "--learning_rate", "5e-3"],
    "adafactor, rate 1e-3": ["--optim", "adafactor", "--learning_rate", "1e-3"],
    # The built-in tokenizer, once more for all bytes; one trained on the corpus, by its number of tokens.
    "builtin": ["--tokenizer", "builtin"],
    **{f"corpus {size}": ["--tokenizer", f"corpus:{size}"] for size in (4096, 6144, 8192, 12288, 16384)},
    # What else was tried on the default.
    "beta2 0.95": ["--adam_beta2", "0.95"],
    "beta2 0.99": ["--adam_beta2", "0.99"],
    "beta2 0.9999": ["--adam_beta2", "0.9999"],
    "beta1 0.8": ["--adam_beta1", "0.8"],
    "no momentum": ["--adam_beta1", "0"],
    "no clipping": ["--max_grad_norm", "0"],
    "weight decay 0.1": ["--weight_decay", "0.1"],
    "epsilon 1e-6": ["--adam_epsilon", "1e-6"],
    "untied": ["--config_overrides", "tie_word_embeddings=false"],
    "hidden rate 0.1": ["--hidden_rate", "0.1"],
    "hidden rate 0.4": ["--hidden_rate", "0.4"],
    "width 128": NARROW,
    "width 128, adamw": [*NARROW, *ADAMW],
    "width 128, plain": [*NARROW, *ONE_RATE],
    **{f"rate {rate}": ["--learning_rate", rate] for rate in RATES},
    # Eight documents a step, as many documents in all.
    **{f"batch 8, rate {rate}": [*BATCH_8, "--learning_rate", rate] for rate in RATES_OF_8},
    **{
        f"stock, batch 8, rate {rate}": [*BATCH_8, "--config_overrides", DROPOUT, *ONE_RATE, "--learning_rate", rate]
        for rate in RATES_OF_8
    },
}

#: Half-lives of the averages of the weights that ride along: documents, or below 1 a share of those so far. Each costs
#: as much as a tenth of a step.
HALF_LIVES = (0.06, 0.1)

#: That of `--average_weights`.
DEFAULT_HALF_LIFE = 0.06

#: What the pictures show.
LOSS = "held-out loss, nats per token"

#: Held-out documents of a part at most.
MOST_HELD_OUT = 1000

#: `--cut`: pieces of one document at most, to learn and to score; shorter ones than so many characters are left out.
MOST_PIECES, HELD_OUT_PIECES, SHORTEST_PIECE = 40, 3, 200


def pieces(record: dict[str, Any], characters: int, most: int) -> Iterator[dict[str, Any]]:
    """A record of the corpus as up to `most` records of `characters` characters each."""
    text = record["text"]
    for first in range(0, min(len(text), most * characters), characters):
        piece = text[first : first + characters]
        if len(piece) >= SHORTEST_PIECE:
            yield record | {"text": piece}


def lay_out(options: argparse.Namespace, folder: Path) -> str:
    """Write the parts of the held-out documents, and with `--cut` what is learned, as JSON lines into `folder`; returns
    what `--dataset` is."""
    held_out: dict[str, list[dict[str, Any]]] = {"select": [], "report": []}
    for number, record in enumerate(records(options.held_out)):
        part = held_out["report" if number % 2 else "select"]
        part.extend(pieces(record, options.cut, HELD_OUT_PIECES) if options.cut else [record])
    for part, found in held_out.items():
        write(folder / f"{part}.jsonl", found[:MOST_HELD_OUT])
    if not options.cut:
        return options.dataset
    found = [piece for record in records(options.dataset) for piece in pieces(record, options.cut, MOST_PIECES)]
    random.Random(0).shuffle(found)
    write(folder / "train.jsonl", found)
    return str(folder / "train.jsonl")


def records(pattern: str) -> Iterator[dict[str, Any]]:
    from slimpajama_hf.corpus import documents, opening

    for document in opening.open_corpus(pattern).records(documents.Cursor()):
        if isinstance(document, documents.Document):
            yield {"text": document.text, "meta": {"redpajama_set_name": document.domain}}


def write(path: Path, found: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in found), encoding="utf-8")


def one_run(options: argparse.Namespace, arm: str, seed: int) -> dict[str, Any]:
    """Train one arm with one seed in this process; scores of the last weights and of their averages."""
    from transformers import TrainerCallback

    import run_clm_slimpajama
    from slimpajama_hf.model.averaging import WeightAverage
    from slimpajama_hf.session import session

    held: dict[str, Any] = {}
    batch = documents_a_step(arm)
    steps, warmup = options.steps // batch, options.warmup_steps // batch

    class Averages(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            held["averages"] = {
                half_life: WeightAverage(model, half_life / batch if half_life >= 1 else half_life)
                for half_life in HALF_LIVES
            }

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for average in held["averages"].values():
                average.step(state.global_step)

    run = session.Session.run

    def with_averages(self: Any) -> int:
        held["trainer"] = self.trainer
        self.trainer.add_callback(Averages())
        return run(self)

    session.Session.run = with_averages  # type: ignore[method-assign]
    never = "1000000000"
    flags = [
        "--dataset", options.dataset, "--tokenizer", "builtin", "--model", "tiny", "--precision", options.precision,
        "--max_steps", str(steps), "--warmup_steps", str(warmup), "--seed", str(seed), "--epochs", "1000",
        "--average_weights", "0", "--no-checkpoint", "--viz_interval", never, "--display_samples", never, *ARMS[arm],
    ]  # fmt: skip
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        code = run_clm_slimpajama.main([*flags, "--output_dir", str(Path(folder) / "run")])
    seconds = time.perf_counter() - started
    trainer = held["trainer"]
    if code or trainer.state.global_step < steps:
        raise SystemExit(f"{arm}: {trainer.state.global_step} of {steps} steps were made (exit code {code})")
    network = trainer.accelerator.unwrap_model(trainer.model)
    tokenizer = trainer.processing_class
    scores = {"last": score_parts(network, tokenizer, options.parts)}
    for half_life, average in held["averages"].items():
        with average.applied():
            scores[f"average {half_life}"] = score_parts(network, tokenizer, options.parts)
    return {"seconds": round(seconds, 1), "parameters": network.num_parameters(), "scores": scores}


def score_parts(network: Any, tokenizer: Any, folder: str) -> dict[str, dict[str, float]]:
    """Loss (nats per predicted token) and bits per byte of a model on both parts of the held-out documents: of what
    fits into 256 tokens, and of all their bytes."""
    from slimpajama_hf.corpus import opening
    from slimpajama_hf.model.presets import vocabulary
    from slimpajama_hf.samples.encoder import Encoder
    from slimpajama_hf.samples.stream import SampleStream
    from slimpajama_hf.training.evaluation import score

    encoder, scores = Encoder(tokenizer), {}
    for part in ("select", "report"):
        corpus = opening.open_corpus(str(Path(folder) / f"{part}.jsonl"))
        stream = SampleStream(corpus, encoder, "truncate", 256)
        found = score(network, stream, vocabulary(tokenizer), whole=(encoder, 256))["all"]
        scores[part] = {
            "loss": found.loss, "bits_per_byte": found.bits_per_byte, "documents": found.samples,
            "all_bits_per_byte": found.whole_bits_per_byte,
        }  # fmt: skip
    return scores


def documents_a_step(arm: str) -> int:
    return 8 if "--gradient_accumulation_steps" in ARMS[arm] else 1


def results_file(options: argparse.Namespace) -> Path:
    return RESULTS / f"{options.name.lower().replace(' ', '-')}.jsonl"


def done(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Results that are there for this corpus, cut like this, this number of steps and this warm-up."""
    path = results_file(options)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    wanted = (options.steps, options.warmup_steps, options.precision, options.cut)
    rows = map(json.loads, lines)
    return [
        row
        for row in rows
        if (row["steps"], row["warmup_steps"], row.get("precision", "float32"), row.get("cut", 0)) == wanted
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and standard error over seeds of each arm and each kind of weights, on both parts."""
    lines = [
        "| recipe | weights | seeds | select, nats | report, nats | report, bits per byte |",
        "|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        of_arm = [row["scores"] for row in rows if row["arm"] == arm and row["flags"] == ARMS[arm]]
        # Not every run had the same averages beside it.
        for weights in dict.fromkeys(weights for scores in of_arm for weights in scores):
            found = [scores[weights] for scores in of_arm if weights in scores]
            cells = [
                mean_and_error([parts[part][what] for parts in found])
                for part, what in (("select", "loss"), ("report", "loss"), ("report", "bits_per_byte"))
            ]
            lines.append(f"| {arm} | {weights} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_and_error(values: list[float]) -> str:
    """`4.316 ± 0.012`: the mean and its standard error; the mean alone of a single value."""
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else mean


def plot(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Held-out loss (`report`) over the rate for each kind of recipe, and the recipes at the default rate beside it."""
    from slimpajama_hf import palette

    def losses(arm: str, weights: str) -> list[float]:
        scores = [row["scores"] for row in rows if row["arm"] == arm]
        return [score[weights]["report"]["loss"] for score in scores if weights in score]

    averaged = f"average {DEFAULT_HALF_LIFE:g}"
    curves = (
        ("AdamW, one rate for all", "plain", "plain, rate ", RATES, "last", "#D55E00"),
        ("the same, averaged", "plain", "plain, rate ", RATES, averaged, "#E69F00"),
        ("the default recipe, averaged", "default", "rate ", RATES, averaged, palette.ACCENT),
        ("eight documents a step, averaged", "", "batch 8, rate ", RATES_OF_8, averaged, "#009E73"),
    )
    drawn = []
    for label, at_default, prefix, rates, weights, colour in curves:
        points = [(float(rate), losses(f"{prefix}{rate}", weights)) for rate in rates]
        points += [(1e-3, losses(at_default, weights))]
        drawn.append((label, colour, sorted((rate, statistics.mean(found)) for rate, found in points if found)))
    # Two points are no curve.
    swept = any(len(points) > 2 for _, _, points in drawn)
    figure = blank(12 if swept else 7.5, 5.2)
    *lefts, right = figure.subplots(1, 2, width_ratios=(1.5, 1)) if swept else [figure.add_subplot()]
    for left in lefts:
        for label, colour, points in drawn:
            if points:
                left.plot(*zip(*points, strict=True), "o-", color=colour, label=label)
        left.set_xscale("log")
        left.set_xlabel("learning rate")
        left.legend(frameon=False)
    bars = [
        ("stock Trainer", "stock", "last"), ("without dropout", "plain", "last"),
        ("matrices at a tenth", "adamw", "last"), ("matrices by Muon", "default", "last"),
        ("and averaged", "default", averaged),
    ]  # fmt: skip
    bars = [bar for bar in bars if losses(*bar[1:])]
    for place, (_, arm, weights) in enumerate(bars):
        found = losses(arm, weights)
        mean = statistics.mean(found)
        right.plot([place] * len(found), found, "o", color=palette.POINT)
        right.plot([place - 0.25, place + 0.25], [mean, mean], color=palette.ACCENT, linewidth=2.5)
        right.annotate(f"{mean:.2f}", (place, max(found)), (0, 8), textcoords="offset points", ha="center")
    right.set_xticks(range(len(bars)), [name.replace(" ", "\n", 1) for name, _, _ in bars])
    right.set_xlabel("at a rate of 1e-3; a dot is a seed, a line their mean")
    for ax in figure.axes:
        ax.set_ylabel(LOSS)
        ax.margins(y=0.15)
    titles = ["By learning rate", "By recipe"][-len(figure.axes) :]
    finish(
        figure, titles, f"{options.name}: {options.steps:,} documents, tiny (5.3M), {options.precision}", options.plot
    )


def blank(width: float, height: float) -> Any:
    """A figure of so many inches on the paper of the charts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from slimpajama_hf import palette

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained", facecolor=palette.PAPER)
    FigureCanvasAgg(figure)
    return figure


def finish(figure: Any, titles: list[str], caption: str, path: str) -> None:
    """Title each panel, put the caption above them, and write the PNG."""
    from slimpajama_hf import palette

    for ax, title in zip(figure.axes, titles, strict=True):
        ax.set_title(title, loc="left", fontweight="bold")
        ax.set_facecolor(palette.PAPER)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    figure.suptitle(caption, x=0.01, ha="left", color=palette.MUTED)
    figure.savefig(path)


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
    parser.add_argument("--cut", type=int, default=0, help="characters of a piece [0: documents as they are]")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each with its share of the cores [1]")
    parser.add_argument("--table", action="store_true", help="print what is there and stop")
    parser.add_argument("--plot", help="a PNG of what is there, likewise")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--parts", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.table = options.table or bool(options.plot)
    if not options.table and not (options.dataset and options.held_out):
        parser.error("--dataset and --held_out are needed to run anything (or --table, to print what is there)")
    if options.one:
        print(json.dumps(one_run(options, options.arms[0], options.seeds[0])))
        return
    if not options.table:
        with tempfile.TemporaryDirectory() as folder:
            make(options, lay_out(options, Path(folder)), folder)
    if options.plot:
        plot(done(options), options)
    print(table(done(options)))


def make(options: argparse.Namespace, dataset: str, parts: str) -> None:
    """Run what is not there yet, `--jobs` at a time."""
    there = [(row["arm"], row["seed"], row["flags"]) for row in done(options)]
    missing = [(arm, seed) for seed in options.seeds for arm in options.arms if (arm, seed, ARMS[arm]) not in there]
    words = [
        __file__, "--one", "--dataset", dataset, "--held_out", options.held_out, "--parts", parts,
        "--name", options.name, "--steps", str(options.steps), "--warmup_steps", str(options.warmup_steps),
        "--precision", options.precision,
    ]  # fmt: skip
    common = {
        "steps": options.steps, "warmup_steps": options.warmup_steps, "precision": options.precision,
        "cut": options.cut, "corpus": options.name, "model": "tiny",
    }  # fmt: skip
    run_all(
        missing, words, {arm: {"flags": ARMS[arm]} | common for arm in options.arms}, results_file(options), options
    )


def run_all(
    missing: list[tuple[str, int]],
    words: list[str],
    facts: dict[str, dict[str, Any]],
    results: Path,
    options: argparse.Namespace,
) -> None:
    """Run `words` with each `--arms` and `--seeds` that is missing, `--jobs` at a time in processes of their own; what
    the last line of a run says goes to `results`, with the facts of its arm."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // options.jobs))
    keep = threading.Lock()

    def run(arm: str, seed: int) -> None:
        print(f"{arm}, seed {seed}", file=sys.stderr)
        made = subprocess.run(
            [sys.executable, *words, "--arms", arm, "--seeds", str(seed)],
            capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": threads},
        )  # fmt: skip
        if made.returncode:
            raise SystemExit(f"{arm}, seed {seed} failed:\n{made.stderr}")
        row = {"arm": arm, "seed": seed} | facts[arm]
        row |= {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "machine": machine()}
        row |= json.loads(made.stdout.splitlines()[-1])
        with keep:
            results.parent.mkdir(parents=True, exist_ok=True)
            with open(results, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        waiting = [pool.submit(run, arm, seed) for arm, seed in missing]
        try:
            for each in concurrent.futures.as_completed(waiting):
                each.result()
        finally:
            for each in waiting:
                each.cancel()


if __name__ == "__main__":
    main()
