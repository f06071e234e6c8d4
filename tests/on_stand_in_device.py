"""What tests/test_stand_in_device.py runs in a process of its own: the step, the optimizers, the recorder and a whole
run of the Trainer on a device that is neither a CPU nor CUDA (`stand_in_device.py`).

    python -m tests.on_stand_in_device

Writes one JSON: each check's name, and what went wrong with it ("" where nothing did).
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from slimpajama_hf.corpus.documents import Cursor, Document
from slimpajama_hf.model import averaging, cuda_graph, gpt2_step, optimization
from slimpajama_hf.model import presets as models
from slimpajama_hf.model.gpt2_step import GPT2Step
from slimpajama_hf.record import noise, teaching
from slimpajama_hf.record.ledger import Ledger, last_rows
from slimpajama_hf.samples.sample import Sample
from slimpajama_hf.training.recorder import StepRecorder
from slimpajama_hf.training.step_numbers import SampleNumbers, Step, StepNumbers, pack
from tests import stand_in_device
from tests.conftest import read_ledger, run_script
from tests.stand_in_device import NAME, Recording, StandIn, moved

CHECKS: dict[str, Callable[[StandIn], None]] = {}


def check(function: Callable[[StandIn], None]) -> Callable[[StandIn], None]:
    CHECKS[function.__name__] = function
    return function


def sample(tokens: int = 5) -> Sample:
    document = Document("text", "RedPajamaC4", "local", "a.jsonl", 3, "f" * 40, 4)
    return Sample(list(range(tokens)), document, Cursor(0, "a.jsonl", 4), 4)


def values_of(step: int) -> torch.Tensor:
    """What the trainer hands to the recorder for a sample of 5 tokens."""
    values = SampleNumbers.pack(torch.tensor(2.5 + step), torch.tensor(3.0), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    return pack(StepNumbers(grad_norm=torch.tensor(0.1), not_finite=torch.tensor(0.0)), [values])


@check
def the_stand_in_refuses_a_mix_and_counts_what_waits(device: StandIn) -> None:
    there = torch.ones(3, device=NAME)
    assert there.device.type == NAME and not there.is_cuda
    try:
        there + torch.ones(3)
    except RuntimeError as error:
        assert "expected all tensors" in str(error)
    else:
        raise AssertionError("two devices were mixed")
    device.waits.clear()
    assert there.sum().item() == 3.0 and sum(device.waits.values()) == 1
    assert there.to("cpu").tolist() == [1.0] * 3 and sum(device.waits.values()) == 2
    there[:1].add_(torch.tensor(1.0))
    assert sum(device.waits.values()) == 2 and there.inner.tolist() == [2.0, 1.0, 1.0]
    pinned = torch.zeros(3).pin_memory()
    there.copy_(pinned, non_blocking=True)
    pinned.fill_(7.0)
    assert (there + 0).inner.tolist() == [7.0] * 3, "a buffer that is used again too early shows"
    assert sum(device.waits.values()) == 2


def rows_of(device: StandIn, folder: Path) -> list[dict[str, Any]]:
    recorder = StepRecorder(Ledger(folder / "ledger.jsonl"), vocab_size=16)
    for step in range(3):
        recorder.add(Step(step, sample(), 1e-3, 0.5), values_of(step).to(NAME))
    recorder.close()
    return last_rows(folder / "ledger.jsonl", 3)


@check
def numbers_leave_a_device_with_streams_without_a_wait(device: StandIn) -> None:
    with tempfile.TemporaryDirectory() as folder:
        on_device = [values_of(step).to(NAME) for step in range(3)]
        device.waits.clear()
        recorder = StepRecorder(Ledger(Path(folder) / "ledger.jsonl"), vocab_size=16)
        for step, values in enumerate(on_device):
            recorder.add(Step(step, sample(), 1e-3, 0.5), values)
            # What the device does to them afterwards is not what was handed over.
            values.zero_()
        recorder.close()
        assert not device.waits, device.waits
        rows = last_rows(Path(folder) / "ledger.jsonl", 3)
        assert [row["loss"] for row in rows] == [2.5, 3.5, 4.5] and rows[0]["grad_norm"] == 0.1


@check
def numbers_leave_a_device_without_streams_by_a_plain_copy(device: StandIn) -> None:
    with stand_in_device.like_mps(), tempfile.TemporaryDirectory() as folder:
        rows = rows_of(device, Path(folder))
    assert [row["loss"] for row in rows] == [2.5, 3.5, 4.5] and rows[0]["accuracy"] == 0.75


# ---- the step ----


def network(words: int = 129, tied: bool = True) -> Any:
    """The same weights each time, none at the value that a fresh model has."""
    torch.manual_seed(5)
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=32, vocab_size=words, n_positions=64, activation_function="gelu_pytorch_tanh",
        bos_token_id=0, eos_token_id=0, tie_word_embeddings=tied, **models.NO_DROPOUT,
    )  # fmt: skip
    made = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made


def ids_of(tokens: int, words: int = 129) -> torch.Tensor:
    """With repetitions: what an embedding's gradient has to add up."""
    drawn = torch.randint(0, words, (tokens,), generator=torch.Generator().manual_seed(tokens))
    drawn[tokens // 2 :] = drawn[: tokens - tokens // 2].clone()
    return drawn


@contextlib.contextmanager
def captured() -> Iterator[None]:
    """The device captures its work, as CUDA does."""
    kept = cuda_graph.recorder_of
    cuda_graph.recorder_of = lambda device: Recording if device.type == NAME else None
    try:
        yield
    finally:
        cuda_graph.recorder_of = kept


def near(there: torch.Tensor, here: torch.Tensor, part: float) -> None:
    error = (there.inner - here).norm() / here.norm().clamp(min=1e-12)
    assert error < part, error


@check
def the_step_is_that_of_a_cpu_captured_or_not(device: StandIn) -> None:
    for precision, part in (("float32", 1e-5), ("bfloat16", 0.03), ("float16", 0.01)):
        for tied in (True, False):
            scale = torch.full((), 256.0) if precision == "float16" else None
            own = GPT2Step(network(tied=tied), precision, 64, scale=scale)
            for graph in (False, True):
                with captured() if graph else contextlib.nullcontext():
                    model = moved(network(tied=tied))
                    there = GPT2Step(model, precision, 64, scale=scale if scale is None else scale.to(NAME))
                    there(ids_of(9))
                for tokens in (64, 2, 3, 40, 64):
                    device.waits.clear()
                    result = there(ids_of(tokens))
                    squares = there.squared_norms()
                    assert not device.waits, device.waits
                    expected = own(ids_of(tokens))
                    assert (there._replayed is not None) == graph
                    near(result.loss, expected.loss, part)
                    near(result.nats[: tokens - 1], expected.nats[: tokens - 1], 3 * part)
                    near(there.gradients, own.gradients, part)
                    near(squares.sqrt(), own.squared_norms().sqrt(), part)
                    assert abs(result.correct.inner.item() - expected.correct.item()) <= (precision != "float32")
                    alone = there.loss_alone(ids_of(tokens))
                    assert alone.inner.item() == result.loss.inner.item()
                    for parameter in model.parameters():
                        assert parameter.grad is not None and parameter.grad.device.type == NAME


@check
def words_that_pad_an_odd_vocabulary_change_nothing(device: StandIn) -> None:
    """129 words are 192 in low precision: same guesses, same loss, same gradients, none of them a word of the padding."""
    kept = gpt2_step.VOCABULARY_STEP
    for precision in ("bfloat16", "float32"):
        found = []
        for step_of in (kept, 1):
            gpt2_step.VOCABULARY_STEP = step_of
            step = GPT2Step(moved(network()), precision, 64)
            result = step(ids_of(50))
            assert len(step._weights.padded(step._head)) == (192 if step_of > 1 and precision == "bfloat16" else 129)
            found.append((result.loss.inner, result.correct.inner, result.nats.inner, step.gradients.inner.clone()))
        gpt2_step.VOCABULARY_STEP = kept
        for padded, plain in zip(*found, strict=True):
            torch.testing.assert_close(padded, plain, rtol=1e-5, atol=1e-6)
        assert torch.isfinite(found[0][3]).all()


@check
def a_capture_that_is_refused_is_said_and_the_step_goes_on(device: StandIn) -> None:
    class Waits(Recording):
        def __init__(self, work: Callable[[], Any]) -> None:
            try:
                super().__init__(lambda: (work(), torch.ones(1, device=NAME).item())[0])
            except RuntimeError as error:
                raise cuda_graph.Refused(str(error)) from error

    said: list[str] = []
    cuda_graph.recorder_of, kept = (lambda device: Waits), cuda_graph.recorder_of
    try:
        there = GPT2Step(moved(network()), "float32", 64, said.append)
        results = [there(ids_of(tokens)) for tokens in (30, 40)]
    finally:
        cuda_graph.recorder_of = kept
    assert len(said) == 1 and "without a CUDA graph" in said[0] and "not permitted" in said[0], said
    own = GPT2Step(network(), "float32", 64)
    for result, tokens in zip(results, (30, 40), strict=True):
        near(result.loss, own(ids_of(tokens)).loss, 1e-5)


@check
def a_capture_out_of_memory_is_no_refusal_and_is_tried_again(device: StandIn) -> None:
    short = [True]

    class Short(Recording):
        def __init__(self, work: Callable[[], Any]) -> None:
            if short.pop():
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().__init__(work)

    said: list[str] = []
    cuda_graph.recorder_of, kept = (lambda device: Short), cuda_graph.recorder_of
    try:
        there = GPT2Step(moved(network()), "float32", 64, said.append)
        try:
            there(ids_of(30))
        except torch.OutOfMemoryError:
            pass
        else:
            raise AssertionError("it was not raised")
        short.append(False)
        there(ids_of(30))
    finally:
        cuda_graph.recorder_of = kept
    assert not said and there._replayed is not None


@check
def optimizers_the_average_and_clipping_wait_for_nothing(device: StandIn) -> None:
    """With Muon's turn among the steps, and one that is skipped; the numbers are those of a CPU."""
    models_of_both = network(), moved(network())
    optimizers, averages = [], []
    for each in models_of_both:
        adamw = torch.optim.AdamW(each.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
        optimizers.append(optimization.AdamWWithMuon.of(adamw, each, 0.2, torch.float32, by_row=True))
        averages.append(averaging.WeightAverage(each, 4))
    steps = [GPT2Step(each, "float32", 64) for each in models_of_both]
    with stand_in_device.like_cuda():
        for number in range(40):
            # At step 31 it is the first matrix' turn.
            bad = number in (3, 31)
            steps[0](ids_of(20 + number % 20))
            norm = steps[0].squared_norms().sum().sqrt()
            optimizers[0].grad_scale = (norm / 0.5).clamp(min=1.0)
            if bad:
                optimizers[0].zero_grad(set_to_none=True)
            device.waits.clear()
            steps[1](ids_of(20 + number % 20))
            norm = steps[1].squared_norms().sum().sqrt()
            optimizers[1].grad_scale = (norm / 0.5).clamp(min=1.0)
            optimizers[1].found_inf = torch.full((), float(bad), device=NAME)
            if bad:
                steps[1].gradients[:99].fill_(math.nan)
            for each in optimizers:
                each.step()
            for average in averages:
                average.step(number + 1)
            assert not device.waits, device.waits
    for here, there in zip(*[each.parameters() for each in models_of_both], strict=True):
        near(there.detach(), here.detach(), 0.01)
    counts = [group["steps"] for each in optimizers for group in each.param_groups if group.get("muon")]
    assert counts == [40, 40]
    with averages[1].applied():
        for here, there in zip(averages[0]._average, models_of_both[1].parameters(), strict=True):
            near(there.detach(), here, 0.01)


# ---- the program as a whole ----

FLAGS = ["--model", "tiny", "--config_overrides", "n_layer=1,n_embd=32,n_head=2,n_positions=64", "--max_seq_length", "64",
         "--tokenizer", "builtin", "--dataset", "embedded", "--viz_interval", "1000", "--display_samples", "1000",
         "--warmup_steps", "5", "--report_to", "none"]  # fmt: skip


def run(folder: str, *flags: str) -> list[dict[str, Any]]:
    """Rows of the ledger of a run into `folder`, on the device where that is taken for the program's own."""
    import run_clm_slimpajama

    assert run_clm_slimpajama.main([*FLAGS, "--output_dir", folder, *flags]) == 0
    return [json.loads(line) for line in (Path(folder) / "ledger.jsonl").read_text().splitlines()]


def on_the_cpu(folder: str, *flags: str) -> list[dict[str, Any]]:
    done = run_script(*FLAGS, "--output_dir", folder, *flags)
    assert done.returncode == 0, done.stderr
    return read_ledger(Path(folder))


def compare(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """The numbers of two runs, to float32's rounding."""
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["text_sha1"] == other["text_sha1"] and mine["update_skipped"] == other["update_skipped"] == ""
        for name in ("loss", "grad_norm", "grad_square", "loss_after", "next_loss"):
            assert (mine[name] is None) == (other[name] is None), (name, mine, other)
            if mine[name] is not None:
                assert abs(mine[name] - other[name]) <= 1e-3 * abs(other[name]), (
                    mine["step"],
                    name,
                    mine[name],
                    other[name],
                )


@check
def a_run_on_a_device_without_streams_whose_optimizer_scales_nothing(device: StandIn) -> None:
    """As on MPS: clipped and skipped by other means, with the numbers of a CPU."""
    flags = ("--max_steps", "14", "--save_steps", "14", "--precision", "float32", "--max_grad_norm", "0.5")
    with tempfile.TemporaryDirectory() as folder:
        theirs = on_the_cpu(f"{folder}/cpu", *flags)
        with stand_in_device.like_mps(), stand_in_device.whole_programs():
            ours = run(f"{folder}/there", *flags)
        compare(ours, theirs)
        assert (Path(folder) / "there/checkpoint-14/model.safetensors").is_file()
        assert max(row["grad_norm"] for row in ours) > 0.5, "clipping was at work"


@contextlib.contextmanager
def measured_often() -> Iterator[None]:
    kept = noise.STEPS_BETWEEN, teaching.STEPS_BETWEEN
    noise.STEPS_BETWEEN, teaching.STEPS_BETWEEN = 9, 7
    try:
        yield
    finally:
        noise.STEPS_BETWEEN, teaching.STEPS_BETWEEN = kept


@check
def a_run_as_on_cuda_waits_for_nothing_and_goes_on_to_the_bit(device: StandIn) -> None:
    """Captured, with a measurement of noise and two of teaching on each side of a cut. accelerate has float32 alone for a
    device that it does not know."""
    from slimpajama_hf.training.trainer import SlimPajamaTrainer

    record = SlimPajamaTrainer._record_step
    waits: dict[int, list[str]] = {}
    synchronized: dict[int, int] = {}

    def recorded(trainer: Any) -> bool:
        # Of steps 2 on, each step's own: what comes before is preparation, what saves waits.
        going_on = record(trainer)
        step = trainer.state.global_step - 1
        # What is shown now and then waits, as it may: passports and samples, when there is time for them.
        waits[step] = [line for line in device.waits if "passports.py" not in line and "gpt2_writing.py" not in line]
        synchronized[step] = device.synchronized
        device.waits.clear()
        return going_on

    SlimPajamaTrainer._record_step = recorded
    flags = ("--precision", "float32", "--save_steps", "10", "--max_steps", "20")
    try:
        with (
            tempfile.TemporaryDirectory() as folder, measured_often(), captured(), stand_in_device.like_cuda(),
            stand_in_device.whole_programs(),
        ):  # fmt: skip
            whole = run(f"{folder}/whole", *flags)
            assert Recording.made[-1].replays >= 20 + 7 * 2 + 2 * 2
            plain = [step for step in waits if step > 2 and step not in (10, 20)]
            assert len(plain) > 10 and not any(waits[step] for step in plain), waits
            # Round a measurement the device is waited for, so that its time is not a step's: teaching at 6 and 13,
            # before the step and after it, noise at 8 and 17, for the others and for the comparison.
            waited = {step: synchronized[step] - synchronized[step - 1] for step in plain if step - 1 in synchronized}
            assert {step: times for step, times in waited.items() if times} == {6: 4, 8: 4, 13: 4, 17: 4}, waited
            shutil.copytree(f"{folder}/whole", f"{folder}/cut")
            shutil.rmtree(f"{folder}/cut/checkpoint-20")
            again = run(f"{folder}/cut", "--resume_from_checkpoint", "true")
            first, second = (load_file(f"{folder}/{name}/checkpoint-20/model.safetensors") for name in ("whole", "cut"))
    finally:
        SlimPajamaTrainer._record_step = record
    times = ("throughput", "step_seconds", "chain")
    assert [{k: v for k, v in row.items() if k not in times} for row in again] == [
        {k: v for k, v in row.items() if k not in times} for row in whole
    ]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert sum(row["grad_square"] is not None for row in whole) == 2
    assert whole[-1]["loss"] < whole[0]["loss"]


def main() -> int:
    found = {}
    asked = sys.argv[1:] or list(CHECKS)
    for name in asked:
        try:
            if name.startswith("a_run_"):
                CHECKS[name](StandIn())
            else:
                with StandIn() as device:
                    CHECKS[name](device)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
