"""What a step costs, and what seeing costs: side by side in one run, rounds interleaved.

    python benchmarks/steps.py                     # tiny, 300 steps a round, 3 rounds
    python benchmarks/steps.py --model small --steps 25 --rounds 3
    python benchmarks/steps.py --history 10000     # what a step costs when 10,000 rows lie behind it

Every row is measured in a process of its own; one of `--model`, one document of 256 tokens a step (of each process),
no dropout. The bare loop and the stock Trainer train the model as transformers has it (`gelu_new`). Times are means
over a round and medians over the rounds; machines are noisy, so read the ratios. `floor` is what the arithmetic alone
takes at the rates that the same machine shows in the same run: products at the rate of a large product, AdamW's 28
bytes a parameter at the rate of a large AdamW. The table is printed and kept as JSON under benchmarks/results/.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

#: Steps that are not counted: caches warm up, the optimizer makes its state.
WARM_UP = 10

ROWS = {
    "floor": "products and AdamW at the machine's own rates",
    "bare loop": "forward, backward, clip, AdamW; nothing else",
    "bare loop, compiled": "the same with torch.compile (a C++ compiler is needed on a CPU); compiling is not counted",
    "litgpt": "its model, tied, compiled, and the step of its pretrain command, in its own environment (make bench)",
    "stock Trainer": "transformers.Trainer, logging every step to nothing",
    "stock Trainer, plain callbacks": "figure every 50 steps, generate every 5, JSON rewritten every step",
    "ours, outputs off": "run_clm_slimpajama.py with ledger and bar, no charts, no samples",
    "ours, everything on": "run_clm_slimpajama.py at its defaults",
    "ours, 2 processes": "the same by two processes (DDP), half of the cores or a GPU for each: two documents a step",
    "ours, 2 accumulated": "the same by one process that accumulates two documents a step (autograd)",
}
PROCESSES = {"ours, 2 processes": 2}
#: Documents of a step.
DOCUMENTS = PROCESSES | {"ours, 2 accumulated": 2}


def samples(count: int) -> Iterator[list[int]]:
    """Blocks of 256 tokens of the embedded corpus."""
    import itertools

    from slimpajama_hf.corpus import opening
    from slimpajama_hf.samples.encoder import Encoder
    from slimpajama_hf.samples.stream import SampleStream
    from slimpajama_hf.samples.tokenizer import load_tokenizer

    stream = SampleStream(opening.open_corpus("embedded"), Encoder(load_tokenizer("builtin")), "pack", 256)
    return (sample.input_ids for sample in itertools.islice(stream, count))


def build(options: argparse.Namespace) -> Any:
    """The model as transformers has it, GPT-2's own activation included."""
    from slimpajama_hf.model import presets
    from slimpajama_hf.samples.tokenizer import load_tokenizer

    config = presets.model_config(options.model, "activation_function=gelu_new", load_tokenizer("builtin"), 256)
    config.vocab_size = vocabulary(options)
    return presets.build(config, seed=42)


def vocabulary(options: argparse.Namespace) -> int:
    """Tiny has the built-in tokenizer's, the others GPT-2's (ids beyond the tokenizer's are learned not to come)."""
    return 4096 if options.model == "tiny" else 50257


def floor(options: argparse.Namespace) -> list[float]:
    """Seconds that one step's products and its AdamW take at the rates this machine shows now, as times of steps."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if options.precision == "bfloat16" else torch.float32
    network = build(options)
    parameters = network.num_parameters()
    multiplied = parameters - network.transformer.wpe.weight.numel()
    del network

    def seconds(function: Any, repeats: int) -> float:
        times = []
        for _ in range(repeats):
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times[2:])

    size = 1536 if device.type == "cpu" else 8192
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    products = 2 * size**3 / seconds(lambda: torch.mm(left, right, out=out), 12)
    weights = torch.zeros(50_000_000, device=device, requires_grad=True)
    weights.grad = torch.zeros_like(weights)
    adamw = torch.optim.AdamW([weights], fused=True)
    step = 6 * multiplied * 256 / products + parameters * seconds(adamw.step, 7) / weights.numel()
    return [step * number for number in range(1, options.steps + 1)]


def bare_loop(options: argparse.Namespace, compiled: bool = False) -> list[float]:
    """The least that a training loop can be; returns the time at which each step ended, seconds."""
    import contextlib

    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = build(options).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
    autocast = (
        torch.autocast(device.type, torch.bfloat16) if options.precision == "bfloat16" else contextlib.nullcontext()
    )
    network.train()
    if compiled:
        network.compile()
    ended = []
    for ids in samples(options.steps):
        input_ids = torch.tensor([ids], device=device)  # (1, 256)
        with autocast:
            loss = network(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        ended.append(time.perf_counter())
    return ended


def litgpt(options: argparse.Namespace) -> list[float]:
    """The step of `litgpt pretrain` (litgpt/pretrain.py, `fit`): Fabric, compiled model, chunked cross-entropy."""
    import torch
    from lightning.fabric import Fabric
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    from slimpajama_hf.model.presets import PRESETS

    preset = PRESETS[options.model]
    size = preset["n_embd"]
    config = Config(
        n_layer=preset["n_layer"], n_head=preset["n_head"], n_embd=size, block_size=257, vocab_size=vocabulary(options),
        padded_vocab_size=vocabulary(options), mlp_class_name="GptNeoxMLP", intermediate_size=4 * size,
        norm_class_name="LayerNorm", bias=True, gelu_approximate="tanh", parallel_residual=False,
    )  # fmt: skip
    fabric = Fabric(devices=1, precision="bf16-mixed" if options.precision == "bfloat16" else "32-true")
    network = GPT(config)
    network.transformer.wte.weight = network.lm_head.weight
    network = fabric.setup(torch.compile(network))
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(network.parameters(), lr=1e-6, weight_decay=0.0, fused=True))
    ended = []
    for ids in samples(options.steps):
        block = torch.tensor([ids], device=fabric.device)  # (1, 256)
        loss = chunked_cross_entropy(network(block)[:, :-1], block[:, 1:])
        fabric.backward(loss)
        fabric.clip_gradients(network, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        ended.append(time.perf_counter())
    return ended


def stock_trainer(options: argparse.Namespace, plain_callbacks: bool) -> list[float]:
    """transformers.Trainer as its documentation shows it, with or without the plainest callbacks for our outputs."""
    import datasets
    import torch
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    from slimpajama_hf import screen
    from slimpajama_hf.samples.tokenizer import load_tokenizer

    screen.quiet_libraries()
    ended: list[float] = []
    network = build(options)
    tokenizer = load_tokenizer("builtin")
    folder = Path(tempfile.mkdtemp())

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ended.append(time.perf_counter())

    class Plain(TrainerCallback):
        """What a user writes first: the whole history drawn, the whole history written."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            state.log_history += [
                {"loss": 5.0, "grad_norm": 1.0, "learning_rate": 1e-3, "step": step} for step in range(options.history)
            ]

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            history = [entry for entry in state.log_history if "loss" in entry]
            (folder / "metrics.json").write_text(json.dumps(history))
            if state.global_step % 50 == 0:
                from matplotlib.figure import Figure

                figure = Figure(figsize=(20, 14))
                for place, name in enumerate(("loss", "grad_norm", "learning_rate"), 1):
                    figure.add_subplot(2, 2, place).plot([entry[name] for entry in history])
                figure.savefig(folder / "chart.png")

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step % 5 == 0:
                ids = tokenizer("def main(", return_tensors="pt").input_ids.to(model.device)
                model.generate(ids, max_new_tokens=40, do_sample=False)

    def examples() -> Iterator[dict[str, list[int]]]:
        for ids in samples(options.steps):
            yield {"input_ids": ids, "labels": ids}

    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=1, max_steps=options.steps, learning_rate=1e-6,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        bf16=options.precision == "bfloat16", use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = Trainer(
        model=network,
        args=arguments,
        train_dataset=datasets.IterableDataset.from_generator(examples),
        callbacks=[*([Plain()] if plain_callbacks else []), Clock()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return ended


def ours(options: argparse.Namespace, outputs: bool, accumulated: int = 1) -> list[float]:
    """The real program, with a clock in its recorder."""
    import run_clm_slimpajama
    from slimpajama_hf.model import presets
    from slimpajama_hf.training import processes, recorder

    ended: list[float] = []
    tell = processes.News.add
    add, configure = recorder.StepRecorder.add, presets.model_config

    def timed(self: Any, step: Any, values: Any) -> None:
        if step.step == 0 and options.history:
            self._ledger._file.write(b"".join(line for line in rows(options.history)))
        add(self, dataclasses.replace(step, step=step.step + options.history), values)
        ended.append(time.perf_counter())

    def told(self: Any, *step: Any) -> Any:
        # Rows come in bursts there; steps do not.
        news = tell(self, *step)
        ended.append(time.perf_counter())
        return news

    def sized(*arguments: Any) -> Any:
        config = configure(*arguments)
        config.vocab_size = vocabulary(options)
        return config

    recorder.StepRecorder.add = timed  # type: ignore[method-assign, assignment]
    processes.News.add = told  # type: ignore[method-assign]
    presets.model_config = sized
    flags = [
        "--dataset", "embedded", "--sample_mode", "pack", "--model", options.model, "--tokenizer", "builtin",
        "--max_steps", str(options.steps), "--learning_rate", "1e-6", "--no-checkpoint",
        "--output_dir", tempfile.mkdtemp(), "--precision", options.precision,
        "--gradient_accumulation_steps", str(accumulated),
    ]  # fmt: skip
    if not outputs:
        flags += ["--viz_interval", "0", "--display_samples", "0"]
    run_clm_slimpajama.main(flags)
    return ended


def rows(count: int) -> Iterator[bytes]:
    """Ledger rows of steps that were never made, for `--history`."""
    import math

    for step in range(count):
        row = {
            "step": step, "loss": 4 + 4 * math.exp(-step / 2000) + 0.3 * math.sin(step * 1.7), "accuracy": 0.2,
            "throughput": 2500.0, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens": 256, "text_bytes": 1000,
            "code_bits": 2000.0, "domain": f"domain {step % 7}", "update_skipped": "", "chain": "0" * 32,
        }  # fmt: skip
        yield (json.dumps(row) + "\n").encode()


def measure(options: argparse.Namespace, started: float) -> dict[str, float]:
    """One row in this process: milliseconds a step, seconds to the first step, peak memory."""
    functions = {
        "floor": lambda: floor(options),
        "bare loop": lambda: bare_loop(options),
        "bare loop, compiled": lambda: bare_loop(options, compiled=True),
        "litgpt": lambda: litgpt(options),
        "stock Trainer": lambda: stock_trainer(options, plain_callbacks=False),
        "stock Trainer, plain callbacks": lambda: stock_trainer(options, plain_callbacks=True),
        "ours, outputs off": lambda: ours(options, outputs=False),
        "ours, everything on": lambda: ours(options, outputs=True),
        "ours, 2 processes": lambda: ours(options, outputs=True),
        "ours, 2 accumulated": lambda: ours(options, outputs=True, accumulated=2),
    }
    ended = functions[options.row]()
    if options.row == "floor":
        return {"ms_per_step": 1000 * ended[0]}
    return {
        # The mean: what charts and samples take counts.
        "ms_per_step": 1000 * (ended[-1] - ended[WARM_UP - 1]) / (len(ended) - WARM_UP),
        "seconds_to_first_step": ended[0] - started,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
    }


def machine() -> dict[str, Any]:
    import torch
    import transformers

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def two_devices() -> bool:
    """Whether two processes have a device each: two GPUs, or a CPU alone."""
    import torch

    return not torch.cuda.is_available() or torch.cuda.device_count() > 1


def commit() -> str:
    """The commit that runs, `+` where files differ from it (results apart, which a bench itself writes)."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, cwd=ROOT, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def main() -> None:
    started = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", type=int, default=300, help="steps a round [300]")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, interleaved [3]")
    parser.add_argument("--history", type=int, default=0, help="rows that lie behind the first step [0]")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="these rows only [all]")
    parser.add_argument("--row", choices=list(ROWS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps <= WARM_UP:
        parser.error(f"--steps {options.steps}: the first {WARM_UP} are not counted; type more than {WARM_UP}")
    if options.row:
        measured = measure(options, started)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(measured))
        return
    interpreters = dict.fromkeys(ROWS, sys.executable) | {"litgpt": str(ROOT / ".venv" / "litgpt" / "bin" / "python")}
    there = [row for row in options.rows if Path(interpreters[row]).exists()]
    if not any(map(shutil.which, ("g++", "c++", "clang++"))):
        print("left out: the compiled row, which needs a C++ compiler", file=sys.stderr)
        there = [row for row in there if row != "bare loop, compiled"]
    if options.history or not two_devices():
        there = [row for row in there if row not in PROCESSES]
    found: dict[str, list[dict[str, float]]] = {row: [] for row in there}
    for number in range(options.rounds):
        for row in found:
            print(f"round {number + 1} of {options.rounds}: {row}", file=sys.stderr)
            launcher, environment = [], dict(os.environ)
            if row in PROCESSES:
                launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES[row])]
                environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // PROCESSES[row]))
            done = subprocess.run(
                [interpreters[row], *launcher, __file__, "--row", row, "--model", options.model,
                 "--precision", options.precision, "--steps", str(options.steps), "--history", str(options.history)],
                capture_output=True, text=True, cwd=ROOT, env=environment,
            )  # fmt: skip
            if done.returncode:
                raise SystemExit(f"{row} failed:\n{done.stderr}")
            found[row].append(json.loads(done.stdout.splitlines()[-1]))
    result = {
        "date": time.strftime("%Y-%m-%d"), "model": options.model, "precision": options.precision,
        "tokens_per_step": 256, "steps": options.steps, "rounds": options.rounds, "history": options.history,
        "commit": commit(), "machine": machine(), "rows": found,
    }  # fmt: skip
    history = f"-history{options.history}" if options.history else ""
    device, made = result["machine"]["device"], f"{result['date']}-{result['commit'].rstrip('+')}"
    name = f"steps-{options.model}-{options.precision}{history}-{device}-{made}.json"
    path = ROOT / "benchmarks" / "results" / name.replace(" ", "-")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{options.model}, {options.precision}, 256 tokens a step, {options.steps} steps, {result['machine']}\n")
    print("| | ms a step | spread | tokens/s | speed, bare = 1 | peak MB | s to first step |")
    print("|---|---|---|---|---|---|---|")
    bare = statistics.median(each["ms_per_step"] for each in found.get("bare loop", next(iter(found.values()))))
    for row, rounds in found.items():
        times = [each["ms_per_step"] for each in rounds]
        middle, documents = statistics.median(times), DOCUMENTS.get(row, 1)
        memory, first = "", ""
        if row != "floor":
            memory = f"{max(each['peak_memory_mb'] for each in rounds):,.0f}"
            first = f"{statistics.median(each['seconds_to_first_step'] for each in rounds):.1f}"
        print(
            f"| {row} | {middle:.1f} | {min(times):.1f} to {max(times):.1f} | {256000 * documents / middle:,.0f} | "
            f"{bare * documents / middle:.2f} | {memory} | {first} |"
        )
    print(f"\nkept in {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
