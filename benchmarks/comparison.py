"""What is learned from as many tokens, and in as many seconds: the stock Trainer, packed batches of 8, and ours.

    python benchmarks/comparison.py --dataset 'TRAIN/*.jsonl.zst' --held_out 'HELD_OUT/*.jsonl.zst' --name 'a sample'
    python benchmarks/comparison.py ... --documents 2500 --jobs 2 --seeds 42
    python benchmarks/comparison.py --name 'a sample' --table      # what is there already, without running anything
    python benchmarks/comparison.py --name 'a sample' --plot FILE.png

`--arms` has more than these: plain loops with AdamW at other rates, for docs/batch-one.md.

The stock Trainer is `transformers.Trainer` with what it does by default (dropout 0.1, AdamW, clipping at 1): with one
document a step as ours, and with batches of 8 packed windows as `run_clm.py` makes them. Ours is the program at its
defaults, everything on. All train the same size in the same precision on the same order of documents, with as long a
warm-up in tokens and a constant rate then, until they have had the tokens of `--documents` documents. Their clock
stands still while they are scored: every `--seconds_between` seconds of training, and at the end. Corpus, parts of the
held-out documents (`--cut` too) and resuming are those of `learning.py`. Results: benchmarks/results/comparison/.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import learning
from transformers import TrainerCallback

RATES_OF_8 = ("3e-4", "5e-4", "1e-3", "2e-3", "4e-3")
RATES_OF_LOOP = ("2e-4", "3e-4", "4e-4", "5e-4", "7e-4", "1e-3")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One program: `ours`, the `stock` Trainer, or a plain `loop` around AdamW."""

    how: str
    windows: int = 1
    """Of a step, each of 256 tokens; one: the beginning of a document."""
    rate: float = 1e-3
    """The highest."""
    flags: tuple[str, ...] = ()
    """Of ours."""
    half_life: float | None = None
    """Of AdamW's second moment, tokens; None: beta2 is 0.999. Of a loop."""
    cosine: bool = False
    """Whether the rate falls to nothing at the end, as half a cosine, and does not stay. Of a loop."""


ARMS: dict[str, Arm] = {
    "ours": Arm("ours"),
    "stock Trainer": Arm("stock"),
    "stock Trainer, 3e-4": Arm("stock", rate=3e-4),
    **{f"packed batches of 8, {rate}": Arm("stock", 8, float(rate)) for rate in RATES_OF_8},
    # Batches of one document as Marek et al. 2025 (arXiv 2507.07101) make them.
    **{
        f"AdamW loop, {rate}{', half-life 1M' * (life is not None)}{', cosine' * cosine}": Arm(
            "loop", rate=float(rate), half_life=life, cosine=cosine
        )
        for rate in RATES_OF_LOOP
        for life in (None, 1e6)
        for cosine in (False, True)
    },
}

MAX_LENGTH = 256


class Clock(TrainerCallback):
    """Scores a model every so many seconds of its training, which its own do not count to; `tokens`: of each step."""

    def __init__(self, options: argparse.Namespace, tokens: Iterator[int]) -> None:
        self.marks: list[dict[str, Any]] = []
        """Seconds, tokens and losses (nats) of each scoring."""
        self.trainer: Any = None
        self.tokenizer: Any = None
        self._options, self._tokens = options, tokens
        self._trained = 0
        self._seconds = 0.0
        self._since = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trained += next(self._tokens)
        seconds = self._seconds + time.perf_counter() - self._since
        if self.is_due(seconds) or state.global_step == state.max_steps:
            found = {"seconds": round(seconds, 2), "steps": state.global_step, "tokens": self._trained}
            self.marks.append(found | self.score(self.trainer.accelerator.unwrap_model(self.trainer.model)))
            self._since = time.perf_counter()
            self._seconds = seconds
            control.should_training_stop |= self.is_enough()

    def is_due(self, seconds: float) -> bool:
        """Whether the model is scored after so many seconds of training."""
        return seconds // self._options.seconds_between > self._seconds // self._options.seconds_between

    def is_enough(self) -> bool:
        """Whether the run has come where it was to come."""
        return False

    def score(self, network: Any) -> dict[str, Any]:
        """What a mark says of the model."""
        scores = {"last": learning.score_parts(network, self.tokenizer, self._options.parts)}
        with self.averaged() as is_there:
            if is_there:
                scores["averaged"] = learning.score_parts(network, self.tokenizer, self._options.parts)
        return {"scores": scores}

    @contextlib.contextmanager
    def averaged(self) -> Iterator[bool]:
        """The model has its averaged weights inside, if it has any yet: whether it has."""
        average = getattr(self.trainer, "average", None)
        if average is None or not average.is_there:
            yield False
            return
        with average.applied():
            yield True


def windows(options: argparse.Namespace, mode: str) -> Iterator[list[int]]:
    """The corpus as samples of up to 256 tokens."""
    from slimpajama_hf.corpus import opening
    from slimpajama_hf.samples.encoder import Encoder
    from slimpajama_hf.samples.stream import SampleStream
    from slimpajama_hf.samples.tokenizer import load_tokenizer

    corpus = opening.open_corpus(options.dataset)
    stream = SampleStream(corpus, Encoder(load_tokenizer("builtin")), mode, MAX_LENGTH, epochs=1000)
    return (sample.input_ids for sample in stream)


def lengths(options: argparse.Namespace) -> list[int]:
    """Tokens of each document."""
    return [len(ids) for ids in itertools.islice(windows(options, "truncate"), options.documents)]


def loop(options: argparse.Namespace, arm: Arm, seed: int, clock_of: Callable[..., Clock] = Clock) -> Clock:
    """A plain loop at one document a step: fused AdamW without weight decay, clipping at 1, autocast, no dropout."""
    import torch

    from slimpajama_hf.model import presets
    from slimpajama_hf.samples.tokenizer import load_tokenizer

    tokenizer, documents = load_tokenizer("builtin"), options.documents
    model = presets.build(presets.model_config("tiny", "", tokenizer, MAX_LENGTH), seed)
    of_documents = lengths(options)
    beta2 = 0.999
    if arm.half_life is not None:
        beta2 = 0.5 ** (sum(of_documents) / documents / arm.half_life)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arm.rate, betas=(0.9, beta2), weight_decay=0.0, fused=True)
    warmup = max(1, round(documents * options.warmup_share))

    def share(step: int) -> float:
        falls = 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, documents - warmup)))
        return min(1.0, (step + 1) / warmup) * (falls if arm.cosine else 1.0)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    clock = clock_of(options, iter(of_documents))
    clock.tokenizer = tokenizer
    clock.trainer = SimpleNamespace(model=model, accelerator=SimpleNamespace(unwrap_model=lambda model: model))
    state = SimpleNamespace(global_step=0, max_steps=documents)
    control = SimpleNamespace(should_training_stop=False)
    device = next(model.parameters()).device
    clock.on_train_begin(None, state, control)
    for ids in itertools.islice(windows(options, "truncate"), documents):
        inputs = torch.tensor([ids], device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bfloat16"):
            loss = model(input_ids=inputs, labels=inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        state.global_step += 1
        clock.on_step_end(None, state, control)
        model.train()
        if control.should_training_stop:
            break
    return clock


def stock(options: argparse.Namespace, arm: Arm, seed: int, clock_of: Callable[..., Clock] = Clock) -> Clock:
    """`transformers.Trainer`; packed where a step has more than one window."""
    import datasets
    import torch
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from slimpajama_hf import screen
    from slimpajama_hf.model import presets
    from slimpajama_hf.samples.tokenizer import load_tokenizer

    screen.quiet_libraries()
    tokenizer, batch = load_tokenizer("builtin"), arm.windows
    of_documents = lengths(options)
    if batch == 1:
        tokens, count = iter(of_documents), options.documents
    else:
        tokens, count = itertools.repeat(batch * MAX_LENGTH), math.ceil(sum(of_documents) / (batch * MAX_LENGTH))
    config = presets.model_config("tiny", f"activation_function=gelu_new,{learning.DROPOUT}", tokenizer, MAX_LENGTH)

    def examples() -> Iterator[dict[str, list[int]]]:
        for ids in windows(options, "truncate" if batch == 1 else "pack"):
            yield {"input_ids": ids, "labels": ids}

    clock = clock_of(options, tokens)
    clock.tokenizer = tokenizer
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=batch, max_steps=count, learning_rate=arm.rate,
            lr_scheduler_type="constant_with_warmup", warmup_steps=round(count * options.warmup_share), seed=seed,
            save_strategy="no", report_to="none", disable_tqdm=True, bf16=options.precision == "bfloat16",
            use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        trainer = Trainer(
            model=presets.build(config, seed),
            args=arguments,
            train_dataset=datasets.IterableDataset.from_generator(examples),
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        clock.trainer = trainer
        trainer.train()
    return clock


def ours(options: argparse.Namespace, arm: Arm, seed: int, clock_of: Callable[..., Clock] = Clock) -> Clock:
    """The program at its defaults, or with the flags of the arm."""
    import run_clm_slimpajama
    from slimpajama_hf.session import session

    clock = clock_of(options, iter(lengths(options)))
    run = session.Session.run

    def timed(self: Any) -> int:
        clock.trainer, clock.tokenizer = self.trainer, self.trainer.processing_class
        self.trainer.add_callback(clock)
        return run(self)

    session.Session.run = timed  # type: ignore[method-assign]
    flags = [
        "--dataset", options.dataset, "--tokenizer", "builtin", "--model", "tiny", "--precision", options.precision,
        "--max_steps", str(options.documents), "--warmup_steps", str(round(options.documents * options.warmup_share)),
        "--seed", str(seed), "--epochs", "1000", *arm.flags,
    ]  # fmt: skip
    try:
        with tempfile.TemporaryDirectory() as folder:
            code = run_clm_slimpajama.main([*flags, "--output_dir", str(Path(folder) / "run")])
    finally:
        session.Session.run = run  # type: ignore[method-assign]
    if code:
        raise SystemExit(f"the program ended with {code}")
    return clock


HOW = {"ours": ours, "stock": stock, "loop": loop}


def one_run(options: argparse.Namespace, arm: str, seed: int) -> dict[str, Any]:
    return {"marks": HOW[ARMS[arm].how](options, ARMS[arm], seed).marks}


def results_file(options: argparse.Namespace) -> Path:
    return learning.RESULTS.parent / "comparison" / learning.results_file(options).name


def done(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Results that are there for this corpus, precision and number of documents."""
    path = results_file(options)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    facts = facts_of(options)
    return [row for row in map(json.loads, lines) if facts.items() <= row.items()]


def facts_of(options: argparse.Namespace) -> dict[str, Any]:
    names = ("documents", "warmup_share", "precision", "cut", "seconds_between")
    return {name: getattr(options, name) for name in names} | {"corpus": options.name, "model": "tiny"}


def table(rows: list[dict[str, Any]]) -> str:
    """Held-out loss (`report`) at equal tokens, and after as many seconds as ours takes for them, mean over seeds."""
    lines = [
        "| | weights | seeds | s for all tokens | loss after all tokens | loss after the seconds of ours |",
        "|---|---|---|---|---|---|",
    ]
    ended = {row["seed"]: row["marks"][-1]["seconds"] for row in rows if row["arm"] == "ours"}
    for arm in ARMS:
        of_arm = [row for row in rows if row["arm"] == arm]
        for weights in ("last", "averaged"):
            found = [row for row in of_arm if weights in row["marks"][-1]["scores"]]
            if not found:
                continue
            at_end = [row["marks"][-1]["scores"][weights]["report"]["loss"] for row in found]
            in_time = [loss_after(row["marks"], weights, ended[row["seed"]]) for row in found if row["seed"] in ended]
            seconds = sum(row["marks"][-1]["seconds"] for row in found) / len(found)
            lines.append(
                f"| {arm} | {weights} | {len(found)} | {seconds:.0f} | {learning.mean_and_error(at_end)} | "
                f"{learning.mean_and_error(in_time) if in_time else ''} |"
            )
    return "\n".join(lines)


def loss_after(marks: list[dict[str, Any]], weights: str, seconds: float) -> float:
    """Held-out loss (`report`) after so many seconds, between two scorings on the line between them; after the last
    one its own, and before the first that of the first."""
    import numpy

    there = [mark for mark in marks if weights in mark["scores"]]
    losses = [mark["scores"][weights]["report"]["loss"] for mark in there]
    return float(numpy.interp(seconds, [mark["seconds"] for mark in there], losses))


def best_packed(rows: list[dict[str, Any]]) -> str | None:
    """The arm of packed batches with the lowest loss after all tokens, chosen by `select`."""
    losses = {
        row["arm"]: row["marks"][-1]["scores"]["last"]["select"]["loss"]
        for row in rows
        if row["arm"].startswith("packed")
    }
    return min(losses, key=losses.__getitem__, default=None)


def plot(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Held-out loss (`report`) over tokens and over seconds, a line for each seed."""
    from slimpajama_hf import palette

    packed = best_packed(rows)
    lines = [("stock Trainer", "stock Trainer, one document a step", "last", "#D55E00")]
    if packed is not None:
        lines.append((packed, f"the same, {packed.replace(', ', ' at a rate of ')}", "last", "#009E73"))
    lines.append(("ours", "ours, last weights", "last", palette.POINT))
    lines.append(("ours", "ours, averaged weights", "averaged", palette.ACCENT))
    figure = learning.blank(12, 4.8)
    left, right = figure.subplots(1, 2, sharey=True)
    for ax, what, unit in ((left, "tokens", 1e6), (right, "seconds", 60.0)):
        for arm, label, weights, colour in lines:
            for row in rows:
                if row["arm"] != arm:
                    continue
                marks = [mark for mark in row["marks"] if weights in mark["scores"]]
                losses = [mark["scores"][weights]["report"]["loss"] for mark in marks]
                ax.plot([mark[what] / unit for mark in marks], losses, color=colour, label=label, linewidth=1.6)
                label = "_"
    left.set_ylabel(learning.LOSS)
    left.legend(frameon=False)
    titles = ["At equal tokens (millions)", "At equal time (minutes of training, one core)"]
    what = f"the tokens of {options.documents:,} documents, tiny (5.3M), {options.precision}; a line is a seed"
    learning.finish(figure, titles, f"{options.name}: {what}", options.plot)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="documents to learn, as --dataset of the program")
    parser.add_argument("--held_out", help="documents to score, likewise")
    parser.add_argument("--name", required=True, help="what the results call this corpus")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=[arm for arm in ARMS if "loop" not in arm])
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 43, 44])
    parser.add_argument("--documents", type=int, default=10_000, help="whose tokens each has to learn from [10,000]")
    parser.add_argument("--warmup_share", type=float, default=0.1, help="of the steps [0.1]")
    parser.add_argument("--seconds_between", type=int, default=60, help="of training, from scoring to scoring [60]")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--cut", type=int, default=0, help="characters of a piece [0: documents as they are]")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each with its share of the cores [1]")
    parser.add_argument("--table", action="store_true", help="print what is there and stop")
    parser.add_argument("--plot", help="a PNG of what is there, likewise")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--parts", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one_run(options, options.arms[0], options.seeds[0])))
        return
    if not (options.table or options.plot):
        if not (options.dataset and options.held_out):
            parser.error("--dataset and --held_out are needed to run anything (or --table, to print what is there)")
        with tempfile.TemporaryDirectory() as folder:
            make(options, Path(folder))
    if options.plot:
        plot(done(options), options)
    print(table(done(options)))


def make(options: argparse.Namespace, folder: Path) -> None:
    """Run what is not there yet, `--jobs` at a time."""
    there = {(row["arm"], row["seed"]) for row in done(options)}
    missing = [(arm, seed) for seed in options.seeds for arm in options.arms if (arm, seed) not in there]
    facts = facts_of(options)
    words = [__file__, "--one", "--dataset", learning.lay_out(options, folder), "--parts", str(folder)]
    words += ["--name", options.name]
    for name in ("documents", "warmup_share", "precision", "seconds_between"):
        words += [f"--{name}", str(facts[name])]
    learning.run_all(missing, words, dict.fromkeys(options.arms, facts), results_file(options), options)


if __name__ == "__main__":
    main()
