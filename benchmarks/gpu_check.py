"""Every claim about CUDA in README and docs, proved or refuted on one GPU in under 8 minutes.

    make gpu-check                                            # on a machine with a GPU
    python benchmarks/gpu_check.py --only correctness,times   # some of its checks
    python benchmarks/gpu_check.py --dry                      # on a CPU, tiny: that the check itself runs

Each check gives numbers and what they are to be; one that fails says so in the JSON and the next goes on. None begins
after --seconds. The JSON is kept under benchmarks/results/ (of a dry one under runs/) and written after every check.
Exit code 1: a check failed, or a claim does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel  # noqa: E402

from benchmarks.watched_program import MARK  # noqa: E402
from slimpajama_hf import precision  # noqa: E402
from slimpajama_hf.model import (  # noqa: E402
    averaging,
    cuda_graph,
    gpt2_step,
    optimization,
)
from slimpajama_hf.model import presets as models  # noqa: E402
from slimpajama_hf.settings.update_rules import UpdateRules  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Largest error of a gradient, relative to autograd's in float64, that a precision may have.
ALLOWED = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}
#: What float16 multiplies the loss by here.
SCALE = 1024.0


@dataclasses.dataclass
class Bench:
    """Where it is checked, and how much."""

    dry: bool
    device: torch.device
    folder: Path
    claims: dict[str, bool] = dataclasses.field(default_factory=dict)
    """What was claimed, and whether it holds."""
    began: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def size(self) -> dict[str, int]:
        return {"n_layer": 1, "n_head": 2, "n_embd": 32} if self.dry else models.PRESETS["small"]

    @property
    def length(self) -> int:
        """Tokens of a sample."""
        return 32 if self.dry else 256

    @property
    def words(self) -> int:
        """Odd, as GPT-2's vocabulary is."""
        return 129 if self.dry else 50257

    def some(self, values: list[Any]) -> list[Any]:
        """All of them, or of a dry check the first."""
        return values[:1] if self.dry else values

    def claim(self, name: str, holds: bool) -> bool:
        self.claims[name] = bool(holds)
        return bool(holds)

    def wait(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()

    def ids(self, tokens: int) -> torch.Tensor:
        """Its second half repeats the first: what an embedding's gradient has to add up. On the device."""
        drawn = torch.randint(0, self.words, (tokens,), device=self.device)
        drawn[tokens // 2 :] = drawn[: tokens - tokens // 2].clone()
        return drawn

    def network(self, size: dict[str, int] | None = None, words: int = 0, **more: Any) -> Any:
        """GPT-2 with none of its weights at the value that a fresh one has."""
        torch.manual_seed(0)
        options = {"activation_function": "gelu_pytorch_tanh", "n_positions": 1024} | models.NO_DROPOUT | more
        config = GPT2Config(
            **(size or self.size), vocab_size=words or self.words, bos_token_id=0, eos_token_id=0, **options
        )
        network = GPT2LMHeadModel(config)
        network.config.pad_token_id, network.loss_type = None, "ForCausalLM"
        network.to(self.device)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        return network

    def optimizer(self, network: Any, precision_: str, **adamw: Any) -> optimization.AdamWWithMuon:
        plain = torch.optim.AdamW(network.parameters(), **{"lr": 1e-4, "weight_decay": 0.0, "fused": True} | adamw)
        dtype = torch.float32 if precision_ == "float32" else torch.bfloat16
        return optimization.AdamWWithMuon.of(plain, network, 0.2, dtype, by_row=True)

    def step(self, network: Any, precision_: str, length: int = 0, **more: Any) -> gpt2_step.GPT2Step:
        scale = torch.full((), SCALE, device=self.device) if precision_ == "float16" else None
        return gpt2_step.GPT2Step(network, precision_, length or self.length, scale=scale, **more)

    def call_ms(self, act: Callable[[], Any], repeats: int = 30) -> dict[str, float]:
        """Median times of a call: on the device between events round it, and the host's to issue it."""
        repeats, warm_up = (2, 1) if self.dry else (repeats, 5)
        for _ in range(warm_up):
            act()
        self.wait()
        on_device, on_host = [], []
        for _ in range(repeats):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self.on_cuda else []
            if events:
                events[0].record()
            began = time.perf_counter()
            act()
            on_host.append(1e3 * (time.perf_counter() - began))
            if events:
                events[1].record()
                events[1].synchronize()
                on_device.append(events[0].elapsed_time(events[1]))
        return {
            "device_ms": round(statistics.median(on_device or on_host), 4),
            "host_ms": round(statistics.median(on_host), 4),
        }

    def loop_ms(self, act: Callable[[], Any], steps: int = 60) -> float:
        """Mean time of a call in a loop that is waited for at its end alone."""
        steps, warm_up = (3, 1) if self.dry else (steps, 8)
        for _ in range(warm_up):
            act()
        self.wait()
        began = time.perf_counter()
        for _ in range(steps):
            act()
        self.wait()
        return round(1e3 * (time.perf_counter() - began) / steps, 4)


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    found, exact = found.detach(), exact.detach()
    return float((found.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30))


def gradients_of(network: Any, scale: float = 1.0) -> list[torch.Tensor]:
    return [parameter.grad.detach() / scale for parameter in network.parameters()]


def by_autograd(
    bench: Bench, network: Any, ids: torch.Tensor, dtype: torch.dtype, low: torch.dtype | None = None
) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    """Surprisals, gradients and tokens right of the same weights in `dtype`, or under autocast to `low`."""
    twin = GPT2LMHeadModel(network.config).to(bench.device, dtype)
    twin.load_state_dict({name: value.to(dtype) for name, value in network.state_dict().items()})
    scale = SCALE if low == torch.float16 else 1.0
    with torch.autocast(bench.device.type, low or torch.bfloat16, enabled=low is not None):
        logits = twin(input_ids=ids[None], use_cache=False).logits[0, :-1]
    nats = F.cross_entropy(logits.to(dtype), ids[1:], reduction="none")
    (nats.mean() * scale).backward()
    return nats.detach(), gradients_of(twin, scale), int((logits.argmax(-1) == ids[1:]).sum())


@contextlib.contextmanager
def uncaptured() -> Iterator[None]:
    kept = cuda_graph.recorder_of
    cuda_graph.recorder_of = lambda device: None
    try:
        yield
    finally:
        cuda_graph.recorder_of = kept


# ---- the checks ----


def environment(bench: Bench) -> dict[str, Any]:
    """What it was measured on."""
    import accelerate
    import transformers

    card = torch.cuda.get_device_properties(0) if bench.on_cuda else None
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "device": card.name if card else "cpu",
        "capability": [card.major, card.minor] if card else None,
        "memory": card.total_memory if card else None,
        "--precision auto": precision.choose("auto", bench.device),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }


def correctness(bench: Bench) -> dict[str, Any]:
    """Losses, surprisals, guesses and every gradient against autograd in float64; captured and not; what waits."""
    found: dict[str, Any] = {}
    networks = {"small": bench.network()}
    if not bench.dry:
        networks["tiny"] = bench.network(models.PRESETS["tiny"], 4096)
    for name, network in networks.items():
        for each in DTYPES:
            found[f"{name} {each}"] = _step_against_autograd(bench, network, each, f"{name} {each}")
    if bench.on_cuda:
        network = bench.network()
        for each in DTYPES:
            found[f"1,024 tokens, {each}"] = _at_full_length(bench, network, each)
    return found


def _step_against_autograd(bench: Bench, network: Any, precision_: str, name: str) -> dict[str, Any]:
    said: list[str] = []
    step = bench.step(network, precision_, trouble=said.append)
    scale = SCALE if precision_ == "float16" else 1.0
    worst: dict[str, float] = defaultdict(float)

    def note(what: str, error: float) -> None:
        worst[what] = max(worst[what], error)

    for tokens in (bench.length, 2, 17, bench.length * 3 // 4):
        ids = bench.ids(tokens) % network.config.vocab_size
        nats, exact, right = by_autograd(bench, network, ids, torch.float64)
        result = step(ids.cpu())
        ours = gradients_of(network, scale)
        note("loss", abs(float(result.loss) - float(nats.mean())))
        note("surprisal", float((result.nats[: tokens - 1].double() - nats).abs().max()))
        note("guesses", abs(int(result.correct) - right))
        note("gradient", max(relative(a, b) for a, b in zip(ours, exact, strict=True) if b.norm() > 0))
        squares = sum(float(each.double().square().sum()) for each in ours)
        note("norm", abs(float(step.squared_norms().sum()) / squares - 1))
        note("loss alone", abs(float(step.loss_alone(ids)) - float(result.loss)))
        if tokens == bench.length and precision_ != "float32":
            _, low, _ = by_autograd(bench, network, ids, torch.float32, DTYPES[precision_])
            note("gradient of autocast", max(relative(a, b) for a, b in zip(low, exact, strict=True) if b.norm() > 0))
    ids = (bench.ids(bench.length) % network.config.vocab_size).cpu()
    runs = []
    for _ in range(6):
        runs.append([step(ids).loss.clone(), step.gradients.clone()])
    with uncaptured():
        eager = bench.step(network, precision_)
        plain = [eager(ids).loss.clone(), eager.gradients.clone()]
    captured = step._replayed is not None
    same = all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
    waits = _what_waits(bench, lambda: (step(ids), step.squared_norms()))
    bench.claim(
        f"{name}: gradients within {ALLOWED[precision_]} of autograd's", worst["gradient"] < ALLOWED[precision_]
    )
    bench.claim(f"{name}: six runs are equal to the bit", same)
    if bench.on_cuda:
        bench.claim(f"{name}: the step is captured", captured and not said)
        bench.claim(f"{name}: a step waits for nothing", waits == "nothing")
    return {what: float(f"{value:.3g}") for what, value in worst.items()} | {
        "captured": captured,
        "said": said,
        "six runs equal to the bit": same,
        "captured and not equal to the bit": all(torch.equal(a, b) for a, b in zip(runs[0], plain, strict=True)),
        "captured against not, gradients": relative(runs[0][1], plain[1]),
        "waits for": waits,
    }


def _what_waits(bench: Bench, act: Callable[[], Any]) -> str:
    if not bench.on_cuda:
        return "a CPU"
    torch.cuda.set_sync_debug_mode("error")
    try:
        act()
    except RuntimeError as error:
        return str(error)[:200]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "nothing"


def _at_full_length(bench: Bench, network: Any, precision_: str) -> dict[str, Any]:
    step, ids = bench.step(network, precision_, 1024), bench.ids(1024)
    step(ids)
    first = step.gradients.clone()
    same = []
    for _ in range(5):
        step(ids)
        same.append(torch.equal(first, step.gradients))
    bench.claim(f"1,024 tokens, {precision_}: equal to the bit", all(same))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step(ids)
        bench.wait()
    kernels = {event.key[:60] for event in profile.key_averages()}
    attention = sorted(each for each in kernels if re.search("flash|fmha|attention|cudnn.*sdpa|mem_eff", each, re.I))
    return {"equal to the bit": all(same), "attention": attention[:6]}


def optimizer(bench: Bench) -> dict[str, Any]:
    """AdamW with Muon, told on the device what to scale by and what to skip, against the same on the CPU."""
    found: dict[str, Any] = {}
    size = {"n_layer": 2, "n_head": 2, "n_embd": 64}
    for name in bench.some(["float32", "bfloat16"]):
        there, here = bench.network(size, 257, n_positions=64), bench.network(size, 257, n_positions=64).cpu()
        adamw = {"lr": 1e-3, "weight_decay": 0.1}
        optimizers = bench.optimizer(there, name, **adamw), bench.optimizer(here, "float32", **adamw, fused=False)
        draw, moved = torch.Generator().manual_seed(1), 0.0
        for number in range(70):
            bad = number in (5, 31, 40)  # at 31 it is a matrix' turn
            gradients = [torch.randn(parameter.shape, generator=draw) for parameter in here.parameters()]
            before = [parameter.detach().clone() for parameter in there.parameters()]
            for mine, theirs, gradient in zip(there.parameters(), here.parameters(), gradients, strict=True):
                mine.grad = (gradient * (float("nan") if bad else 1.0)).to(bench.device)
                theirs.grad = None if bad else gradient / 2.0
            optimizers[0].grad_scale = torch.full((), 2.0, device=bench.device)
            optimizers[0].found_inf = torch.full((), float(bad), device=bench.device)
            for each in optimizers:
                each.step()
            if bad:
                after = [parameter.detach() for parameter in there.parameters()]
                moved = max(moved, *(float((a - b).abs().max()) for a, b in zip(after, before, strict=True)))
        apart = max(relative(a.cpu(), b) for a, b in zip(there.parameters(), here.parameters(), strict=True))
        bench.claim(f"optimizer, {name}: a skipped update moves nothing", moved == 0.0)
        bench.claim(f"optimizer, {name}: as on a CPU", apart < (1e-3 if name == "float32" else 0.05))
        found[name] = {"weights after 67 updates, from the CPU's": apart, "a skipped update moved them by": moved}
    matrix = torch.randn(768, 3072, device=bench.device) if not bench.dry else torch.randn(64, 256)
    found["orthogonal, bfloat16 against float32"] = relative(
        optimization.orthogonal(matrix, torch.bfloat16), optimization.orthogonal(matrix, torch.float32)
    )
    return found


def times(bench: Bench) -> dict[str, Any]:
    """A step of the 124M model and its parts, a bare loop, and the floor at the card's own rates."""
    rates = _rates(bench)
    found: dict[str, Any] = {"rates": rates}
    for each in bench.some(["bfloat16", "float32", "float16"]):
        found[each] = _times_of_a_step(bench, each, rates)
        if bench.on_cuda:
            torch.cuda.empty_cache()
        found[each]["bare loop"] = bench.loop_ms(_bare_loop(bench, each, bench.ids(bench.length)))
        if bench.on_cuda:
            torch.cuda.empty_cache()
    found["head"] = _times_of_the_head(bench)
    return found


def _rates(bench: Bench) -> dict[str, float]:
    """Bytes copied and floating-point operations of a large product, a second."""
    numbers = torch.empty(2**16 if bench.dry else 2**28, device=bench.device)
    other = torch.empty_like(numbers)
    found = {"bytes": 2e3 * numbers.nbytes / bench.call_ms(lambda: other.copy_(numbers), 10)["device_ms"]}
    for name, size in (("bfloat16", 8192), ("float16", 8192), ("float32", 4096)):
        size = 64 if bench.dry else size
        square = torch.randn(size, size, device=bench.device, dtype=DTYPES[name])
        found[name] = 2e3 * size**3 / bench.call_ms(lambda square=square: square @ square, 10)["device_ms"]
    return found


def _times_of_a_step(bench: Bench, name: str, rates: dict[str, float]) -> dict[str, Any]:
    network, on_host = bench.network(), bench.ids(bench.length).cpu()
    optimizer_ = bench.optimizer(network, name)
    step = bench.step(network, name, seldom_changed=optimizer_.matrices)
    scale = torch.full((), SCALE if name == "float16" else 1.0, device=bench.device)

    def update() -> None:
        norm = step.squared_norms().sum().sqrt()
        optimizer_.grad_scale = ((norm + 1e-6) / 1.0).clamp(min=1.0) * scale
        optimizer_.found_inf = 1.0 - torch.isfinite(norm).float()
        optimizer_.step()

    def whole() -> None:
        step(on_host)
        update()

    step(on_host)
    row: dict[str, Any] = {
        "captured": step._replayed is not None,
        "step": bench.call_ms(lambda: step(on_host)),
        "of it the copies of the weights": bench.call_ms(step._weights.refresh),
        "norms": bench.call_ms(step.squared_norms),
        "optimizer, mean over Muon's turns": bench.loop_ms(update, 48),
        "whole step without the Trainer": bench.loop_ms(whole, 96),
    }
    with uncaptured():
        eager = bench.step(network, name, seldom_changed=optimizer_.matrices)
        row["step, not captured"] = bench.call_ms(lambda: eager(on_host))
    average = averaging.WeightAverage(network, 0.06)
    row["average, a touch in 10"] = bench.call_ms(lambda: average.step(10))
    parameters, muon = sum(p.numel() for p in network.parameters()), sum(p.numel() for p in optimizer_.matrices)
    multiplied = parameters - 1024 * bench.size["n_embd"]
    moved = (parameters - muon) * 28 + muon * 12 + parameters * 8 + multiplied * (4 if name == "float32" else 2) * 3
    row["floor"] = {
        "products_ms": round(6e3 * bench.length * multiplied / rates[name], 3),
        "bytes_ms": round(1e3 * moved / rates["bytes"], 3),
    }
    return row


def _bare_loop(bench: Bench, name: str, ids: torch.Tensor) -> Callable[[], None]:
    """transformers' model, autocast, clipping and AdamW; nothing else (float16 without a scale)."""
    network = bench.network(activation_function="gelu_new")
    adamw = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def act() -> None:
        low = name != "float32"
        with torch.autocast(bench.device.type, DTYPES[name] if low else torch.bfloat16, enabled=low):
            logits = network(input_ids=ids[None], use_cache=False).logits[0, :-1]
        F.cross_entropy(logits.float(), ids[1:]).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()

    return act


def _times_of_the_head(bench: Bench) -> dict[str, Any]:
    """Is an odd vocabulary slow, and is it worth that the head's gradient is first made in low precision?"""
    width, tokens, found = bench.size["n_embd"], bench.length, {}
    for words in (bench.words, -(-bench.words // gpt2_step.VOCABULARY_STEP) * gpt2_step.VOCABULARY_STEP):
        made = {"device": bench.device, "dtype": torch.bfloat16}
        hidden, head = torch.randn(tokens, width, **made), torch.randn(words, width, **made)
        gradient, out = torch.randn(tokens, words, **made), torch.empty(words, width, device=bench.device)
        timed = {
            "logits": lambda hidden=hidden, head=head: torch.mm(hidden, head.t()),
            "gradient of hidden": lambda gradient=gradient, head=head: torch.mm(gradient, head),
            "gradient of head, by way of bfloat16": lambda gradient=gradient, hidden=hidden, out=out: out.copy_(
                torch.mm(gradient.t(), hidden)
            ),
        }
        if bench.on_cuda:
            timed["gradient of head, straight into float32"] = lambda gradient=gradient, hidden=hidden, out=out: (
                torch.mm(gradient.t(), hidden, torch.float32, out=out)
            )
        row: dict[str, Any] = {}
        for name, act in timed.items():
            try:
                row[name] = bench.call_ms(act)["device_ms"]
            except RuntimeError as error:
                row[name] = str(error)[:120]
        found[f"{words:,} words"] = row
    return found


def stock(bench: Bench) -> dict[str, Any]:
    """transformers.Trainer as it comes, one sample of 256 tokens a step, milliseconds a step."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    found: dict[str, Any] = {}
    for name in bench.some(["float32", "bfloat16"]):
        stamps: list[float] = []

        class Clock(TrainerCallback):
            def on_step_end(self, *_: Any, stamps: list[float] = stamps, **__: Any) -> None:
                stamps.append(time.perf_counter())

        class Samples(torch.utils.data.IterableDataset):
            def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
                while True:
                    ids = torch.randint(0, bench.words, (bench.length,))
                    yield {"input_ids": ids, "labels": ids}

        arguments = TrainingArguments(
            output_dir=str(bench.folder / "stock"), max_steps=4 if bench.dry else 80, per_device_train_batch_size=1,
            bf16=name == "bfloat16", report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
            use_cpu=not bench.on_cuda,
        )  # fmt: skip
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            network = bench.network(activation_function="gelu_new")
            Trainer(model=network, args=arguments, train_dataset=Samples(), callbacks=[Clock()]).train()
        first = len(stamps) // 4
        found[name] = round(1e3 * (stamps[-1] - stamps[first]) / (len(stamps) - 1 - first), 3)
    return found


# ---- the program as a whole ----


def program(
    bench: Bench,
    name: str,
    *flags: str,
    watch: dict[str, Any] | None = None,
    launcher: tuple[str, ...] = (),
    variables: dict[str, str] | None = None,
    kill_at: tuple[int, int] | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A run of it by itself, watched: what it came to, and the rows of its ledger. `kill_at`: the checkpoint that has
    to be there and the rows that have to be written before it is killed."""
    folder = bench.folder / name
    command = [
        *(launcher or (sys.executable,)), str(ROOT / "benchmarks/watched_program.py"), "--dataset", "embedded",
        "--output_dir", str(folder), "--viz_interval", "1000000", "--display_samples", "1000000", *flags,
    ]  # fmt: skip
    asked = {"WATCH": json.dumps(watch or {}), "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.Popen(
        command, env=os.environ | asked | (variables or {}), cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    ledger = folder / "ledger.jsonl"
    try:
        if kill_at is not None:
            _kill(process, bench.dry, folder / f"checkpoint-{kill_at[0]}", ledger, kill_at[1])
        output, _ = process.communicate(timeout=400 if bench.dry else 100)
    except subprocess.TimeoutExpired:
        process.kill()
        output = process.communicate()[0] + "\nit took too long\n"
    rows = [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.is_file() else []
    seen = [json.loads(line.removeprefix(MARK)) for line in output.splitlines() if line.startswith(MARK)]
    seconds = [row["step_seconds"] for row in rows[len(rows) // 4 :]]
    telling = re.compile(r"error|CUDA graph|out of memory|Traceback|device  |backward  |it took too long", re.I)
    said = [line.strip()[:220] for line in output.splitlines() if telling.search(line) and not line.startswith(MARK)]
    _tell(bench, f"  {name}: exit code {process.returncode}, {len(rows)} steps")
    return {
        "exit code": process.returncode,
        "steps": len(rows),
        "mean ms": round(1e3 * statistics.fmean(seconds), 3) if seconds else None,
        "median ms": round(1e3 * statistics.median(seconds), 3) if seconds else None,
        "last loss": rows[-1]["loss"] if rows else None,
        "skipped": [row["step"] for row in rows if row["update_skipped"]],
        "seen": seen[-1] if seen else None,
        "said": said[-6:],
    }, rows


def _kill(process: subprocess.Popen[str], patient: bool, checkpoint: Path, ledger: Path, rows: int) -> None:
    limit = time.monotonic() + (400 if patient else 90)
    while process.poll() is None and time.monotonic() < limit:
        if checkpoint.is_dir() and ledger.is_file() and ledger.read_bytes().count(b"\n") >= rows:
            process.kill()
        time.sleep(0.01)


def _model(bench: Bench, on_a_card: str = "small") -> tuple[str, ...]:
    """Flags of a model that suits the machine."""
    smallest = "n_layer=1,n_embd=32,n_head=2,n_positions=64"
    if bench.dry:
        return "--model", "tiny", "--config_overrides", smallest, "--max_seq_length", "64"
    return "--model", on_a_card


def whole(bench: Bench) -> dict[str, Any]:
    """The program at 124M (with the built-in tokenizer): milliseconds a step by its own ledger, what it waits for."""
    steps, found = 8 if bench.dry else 300, {}
    waits = {} if bench.dry else {"waits": [30, 80]}
    runs: list[tuple[str, int, tuple[str, ...], dict[str, Any]]] = [
        ("as it comes", steps, (), waits),
        ("everything shown", steps, ("--viz_interval", "50", "--display_samples", "5"), {}),
        ("float32", steps // 3, ("--precision", "float32"), {}),
        ("float16", steps // 3, ("--precision", "float16"), {}),
        ("by autograd", steps // 3, ("--backward", "autograd"), {}),
    ]
    for name, count, flags, watch in bench.some(runs):
        result, rows = program(
            bench, name.replace(" ", "-"), *_model(bench), "--max_steps", str(count), "--no-checkpoint", *flags,
            watch=watch,
        )  # fmt: skip
        found[name] = result
        bench.claim(f"the program, {name}: it runs and learns", _learns(result, rows))
        if watch and bench.on_cuda:
            bench.claim("the program waits for nothing in its steps", not (result["seen"] or {}).get("waits", True))
    return found


def _learns(result: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    return result["exit code"] == 0 and len(rows) > 4 and rows[-1]["loss"] is not None


def by_path(bench: Bench) -> dict[str, Any]:
    """The precision that a forward hook saw (in the step that is written out: its first product), path by path."""
    llama = bench.folder / "llama.json"
    llama.write_text(
        json.dumps(
            {
                "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
            }
        )
    )  # fmt: skip
    short = ("--max_seq_length", "64", "--max_steps", "8", "--no-checkpoint")
    tiny = (*_model(bench, "tiny"), *short)
    paths = {
        "accumulation": (*tiny, "--gradient_accumulation_steps", "2"),
        "written out": tiny,
        "autograd": (*tiny, "--backward", "autograd"),
        "Llama": ("--model", str(llama), *short),
    }
    cells = [(path, each) for path in paths for each in ("bfloat16", "float16")] + [("autograd", "float32")]
    found: dict[str, Any] = {}
    for path, each in bench.some(cells):
        result, _ = program(bench, f"{path}-{each}".replace(" ", "-"), *paths[path], "--precision", each)
        seen = result["seen"] or {}
        computed = seen.get("dtype seen by a hook", seen.get("computes in"))
        bench.claim(f"{path}, --precision {each}: computed in it", computed == each and result["exit code"] == 0)
        found[f"{path}, {each}"] = {"computed in": computed, "exit code": result["exit code"], "said": result["said"]}
    return found


def resume(bench: Bench) -> dict[str, Any]:
    """Two whole runs, and one killed by SIGKILL and resumed: ledgers and weights to the bit, measurements included."""
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    steps, saved, killed = ("8", "4", (4, 5)) if bench.dry else ("60", "30", (30, 40))
    watch = {"noise": 3, "teaching": 3} if bench.dry else {"noise": 13, "teaching": 11}
    for each in bench.some(["float32", "bfloat16", "float16"]):
        flags = (*_model(bench), "--max_steps", steps, "--save_steps", saved, "--precision", each)
        _, first = program(bench, f"first-{each}", *flags, watch=watch)
        again = None if bench.dry else program(bench, f"again-{each}", *flags, watch=watch)[1]
        _, before = program(bench, f"cut-{each}", *flags, watch=watch, kill_at=killed)
        result, cut = program(bench, f"cut-{each}", *flags, "--resume_from_checkpoint", "true", watch=watch)
        paths = [bench.folder / f"{name}-{each}/checkpoint-{steps}/model.safetensors" for name in ("first", "cut")]
        weights = [load_file(path) if path.is_file() else {} for path in paths]
        same_weights = bool(weights[0]) and weights[0].keys() == weights[1].keys()
        same_weights = same_weights and all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        parted = _first_difference(first, cut)
        bench.claim(f"resume, {each}: ledger and weights to the bit", parted is None and same_weights)
        if again is not None:
            bench.claim(f"{each}: two runs are equal to the bit", _first_difference(first, again) is None)
        found[each] = {
            "rows when it was killed": len(before), "parted": parted, "weights equal to the bit": same_weights,
            "two runs parted": again and _first_difference(first, again), "said": result["said"],
        }  # fmt: skip
    return found


def _first_difference(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> dict[str, Any] | None:
    times_of_it = {"throughput", "step_seconds", "chain"}
    for row, other in zip(rows, others, strict=False):
        differ = {name: (value, other.get(name)) for name, value in row.items() if value != other.get(name)}
        if differ.keys() - times_of_it:
            return {"step": row["step"]} | {name: differ[name] for name in sorted(differ.keys() - times_of_it)[:4]}
    return None if len(rows) == len(others) and rows else {"rows": (len(rows), len(others))}


def memory(bench: Bench) -> dict[str, Any]:
    """What the step needs, and the program on a card that is nearly too small: measuring is left out, not the run."""
    found: dict[str, Any] = {}
    limits = [(4.0e9, "float32"), (3.2e9, "float32"), (3.2e9, "bfloat16")]
    for limit, each in [] if bench.dry else limits:
        result, _ = program(
            bench, f"memory-{limit:.1e}-{each}", *_model(bench), "--max_steps", "40", "--precision", each,
            "--save_steps", "20", watch={"memory": limit, "noise": 15, "teaching": 7},
        )  # fmt: skip
        plain = not any("Traceback" in line for line in result["said"])
        bench.claim(f"{limit / 1e9} GB, {each}: a run, or a sentence", plain)
        found[f"{limit / 1e9} GB, {each}"] = result
    if bench.on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    network = bench.network()
    optimizer_ = bench.optimizer(network, "float32")
    step, average = (
        bench.step(network, "float32", seldom_changed=optimizer_.matrices),
        averaging.WeightAverage(network, 0.06),
    )
    for _ in range(3):
        step(bench.ids(bench.length).cpu())
        optimizer_.step()
    noise_buffer = torch.zeros_like(step.gradients)
    held = torch.cuda.max_memory_allocated() if bench.on_cuda else None
    found[f"{bench.words:,} words, float32, with the buffer for noise"] = {
        "allocated": held, "reserved": torch.cuda.max_memory_reserved() if bench.on_cuda else None,
        "weights, gradients, moments, average, noise": sum(p.numel() for p in network.parameters()) * 4 * 4
        + optimization.moments_bytes(network, UpdateRules()),
    }  # fmt: skip
    del noise_buffer, average
    return found


def launchers(bench: Bench) -> dict[str, Any]:
    """One process by torchrun, float16 by the launcher's wish, and a capture that the driver refuses."""
    found: dict[str, Any] = {}
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")
    short = (*_model(bench, "tiny"), "--max_steps", "8" if bench.dry else "30", "--no-checkpoint")
    result, rows = program(bench, "torchrun", *short, launcher=torchrun)
    bench.claim("torchrun, one process: it runs", _learns(result, rows))
    found["torchrun, one process"] = result
    if not bench.dry:
        result, rows = program(bench, "asked-by-launcher", *short, variables={"ACCELERATE_MIXED_PRECISION": "fp16"})
        seen = (result["seen"] or {}).get("computes in")
        bench.claim("a launcher's fp16 is float16", _learns(result, rows) and seen == "float16")
        found["the launcher asks for fp16"] = result
    result, rows = program(bench, "refused", *short, watch={"break_capture": True, "noise": 9, "teaching": 7})
    seen = result["seen"] or {}
    goes_on = _learns(result, rows) and not seen.get("captured", True)
    if bench.on_cuda:
        told = any("without a CUDA graph" in line for line in result["said"])
        goes_on = goes_on and told and seen.get("own stream", False)
    bench.claim("a capture that is refused is said, and the run goes on in its own stream", goes_on)
    found["a capture is refused"] = result
    return found


CHECKS: list[Callable[[Bench], dict[str, Any]]] = [
    environment, correctness, optimizer, resume, by_path, times, whole, memory, launchers, stock,
]  # fmt: skip


def _tell(bench: Bench, what: str) -> None:
    print(f"[{time.monotonic() - bench.began:6.1f} s] {what}", file=sys.stderr, flush=True)


def check(bench: Bench, only: set[str], seconds: float, output: Path) -> int:
    """Make the checks, keep what they found after each of them; 0 where all went and every claim holds."""
    found: dict[str, Any] = {"dry": bench.dry, "claims": bench.claims, "seconds": {}}
    failed = False
    output.parent.mkdir(parents=True, exist_ok=True)
    for each in CHECKS:
        name = each.__name__
        if only and name not in only:
            continue
        began = time.monotonic()
        if began - bench.began > seconds:
            found[name], failed = "no time was left", True
            continue
        try:
            found[name] = each(bench)
        except Exception as error:
            failed = True
            found[name] = {
                "failed": f"{type(error).__name__}: {str(error)[:400]}",
                "at": traceback.format_exc().splitlines()[-6:],
            }
        found["seconds"][name] = round(time.monotonic() - began, 1)
        _tell(bench, f"{name} {'failed' if 'failed' in found[name] else 'done'}")
        output.write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")
    refuted = [claim for claim, holds in bench.claims.items() if not holds]
    print(f"{len(bench.claims) - len(refuted)} of {len(bench.claims)} claims hold; {output}")
    for claim in refuted:
        print(f"does not hold: {claim}")
    return 1 if failed or refuted else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="on a CPU, tiny: that the check itself runs")
    parser.add_argument("--only", default="", help=f"some of {', '.join(each.__name__ for each in CHECKS)}")
    parser.add_argument("--seconds", type=float, default=450, help="none begins after so many (default: 450)")
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    options = parser.parse_args()
    only = {name for name in options.only.split(",") if name}
    unknown = only - {each.__name__ for each in CHECKS}
    if unknown:
        parser.error(f"--only {','.join(sorted(unknown))}: expected some of {', '.join(c.__name__ for c in CHECKS)}")
    if not options.dry and not torch.cuda.is_available():
        print("gpu_check: no GPU that PyTorch can use was found; add --dry to try the check itself on the CPU")
        return 2
    output = options.output or ROOT / (
        "runs/gpu_check_dry.json" if options.dry else "benchmarks/results/gpu_check.json"
    )
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as folder:
        bench = Bench(options.dry, torch.device("cpu" if options.dry else "cuda"), Path(folder))
        return check(bench, only, options.seconds, output)


if __name__ == "__main__":
    raise SystemExit(main())
