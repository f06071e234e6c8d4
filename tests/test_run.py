"""A whole run through the real command line, looked at from outside: files, numbers, weights, exit codes."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from slimpajama_hf.corpus import opening
from slimpajama_hf.corpus.documents import Cursor
from slimpajama_hf.record import checkpoints, run_folder
from slimpajama_hf.record.columns import read_columns
from tests.conftest import (
    NANO,
    ROOT,
    environment,
    make_records,
    read_ledger,
    run_command,
    run_script,
    start_script,
    write_records,
)


def load(checkpoint: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint).eval()


def text_of(shards: Path, row: dict) -> str:
    corpus = opening.open_corpus(str(shards / row["shard"]))
    return next(iter(corpus.records(Cursor(shard=row["shard"], row=row["row"])))).text


def test_the_folder_holds_what_the_readme_says(finished):
    names = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    checkpoint = {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json",
        "tokenizer.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "data_state.json", "manifest.json",
    }  # fmt: skip
    # The average of the weights: a model of its own.
    model = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.model", "tokenizer.json",
             "tokenizer_config.json"}  # fmt: skip
    checkpoint |= {f"averaged/{name}" for name in (*model, "averaging.json")}
    expected = {f"checkpoint-{step}/{name}" for step in (10, 20, 30, 40) for name in checkpoint}
    expected |= {"ledger.jsonl", "surprisals.f32", "samples.jsonl", "passports.jsonl", "prompts.jsonl"}
    expected |= {"run.json", "run_config.yaml", "report.html", "_index/search.sqlite", "_made_here", "_lock"}
    viz = ("metrics_history.json", "text_samples.json", "training_latest.png")
    expected |= {f"training_viz/{name}" for name in (*viz, "training_step_000020.png", "training_step_000040.png")}
    assert names == expected


@pytest.mark.parametrize("words", [["run_clm_slimpajama.py", "--test"], ["-m", "slimpajama_hf", "report", "x"]])
def test_a_python_without_what_is_needed_is_one_sentence(words):
    done = subprocess.run([sys.executable, "-S", *words], capture_output=True, text=True, env=environment(), cwd=ROOT)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "is not installed in this Python" in done.stderr and "make install" in done.stderr


def test_every_step_is_one_document_in_file_order(finished, shards):
    rows = read_ledger(finished)
    assert [row["step"] for row in rows] == list(range(40))
    documents = list(opening.open_corpus(f"{shards}/*").records(Cursor()))[:40]
    for row, document in zip(rows, documents, strict=True):
        assert (row["shard"], row["row"], row["text_sha1"], row["domain"]) == (
            document.shard,
            document.row,
            document.sha1,
            document.domain,
        )


def test_the_schedule_starts_at_one_warmup_th_and_stays(finished):
    rates = [row["learning_rate"] for row in read_ledger(finished)]
    assert rates == [pytest.approx(1e-3 * min(1, (step + 1) / 20), rel=1e-12) for step in range(40)]


@pytest.mark.parametrize("step", [10, 20, 30])
def test_loss_and_accuracy_are_the_models_own(finished, shards, encoder, step):
    """The row of step s is what the weights of checkpoint-s say of that document."""
    row = read_ledger(finished)[step]
    model = load(finished / f"checkpoint-{step}")
    ids = torch.tensor([encoder.encode(text_of(shards, row))[0][:256]])
    assert row["tokens"] == ids.shape[1]
    with torch.no_grad():
        out = model(input_ids=ids, labels=ids)
    # 5.23 divides by L where L-1 tokens are predicted: the model itself, loaded afresh, does so only in the Trainer.
    assert row["loss"] == pytest.approx(out.loss.item(), abs=1e-5)
    right = (out.logits[0, :-1].argmax(-1) == ids[0, 1:]).float().mean().item()
    assert row["accuracy"] == pytest.approx(right, abs=1e-12 + 1e-7)
    bits = (row["loss"] * (row["tokens"] - 1) + math.log(4096)) / math.log(2)
    assert row["code_bits"] == pytest.approx(bits, rel=1e-9)


def test_the_gradient_norm_is_that_of_the_mean_loss(finished, shards, encoder):
    row = read_ledger(finished)[20]
    model = load(finished / "checkpoint-20")
    ids = torch.tensor([encoder.encode(text_of(shards, row))[0][:256]])
    model(input_ids=ids, labels=ids).loss.backward()
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]))
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


@pytest.mark.parametrize("step", [10, 20, 30])
def test_a_sample_is_what_generate_writes_with_that_steps_weights(finished, shards, encoder, step):
    samples = json.loads((finished / "training_viz" / "text_samples.json").read_text())
    assert [sample["step"] for sample in samples] == [0, 10, 20, 30]
    sample = samples[step // 10]
    row = read_ledger(finished)[step]
    prompt = encoder.encode(text_of(shards, row))[0][:10]
    model = load(finished / f"checkpoint-{step}")
    ids = torch.tensor([prompt])
    written = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40)
    written = written[0, len(prompt) :].tolist()
    assert sample["output_ids"] == written
    assert text_of(shards, row).startswith(sample["input"])
    assert encoder.decode(prompt + written) == sample["input"] + sample["output"]
    assert sample["accuracy"] == row["accuracy"]


def test_metrics_history_is_a_view_of_the_ledger(finished):
    rows = read_ledger(finished)
    history = json.loads((finished / "training_viz" / "metrics_history.json").read_text())
    assert list(history)[:5] == ["steps", "loss", "accuracy", "throughput", "learning_rate"]
    assert history["steps"] == list(range(40))
    for name in ("loss", "accuracy", "throughput", "learning_rate"):
        assert history[name] == [row[name] for row in rows]


def test_the_latest_chart_is_a_real_picture_equal_to_the_newest(finished):
    viz = finished / "training_viz"
    assert not (viz / "training_latest.png").is_symlink()
    assert (viz / "training_latest.png").read_bytes() == (viz / "training_step_000040.png").read_bytes()
    assert (viz / "training_latest.png").read_bytes().startswith(b"\x89PNG")


def test_every_checkpoint_is_whole_and_damage_is_noticed(finished, tmp_path):
    import shutil

    for step in (10, 20, 30, 40):
        assert checkpoints.problem(finished / f"checkpoint-{step}") is None
    damages = {
        "model.safetensors is not what was saved": lambda path: _flip(path / "model.safetensors"),
        "optimizer.pt is missing": lambda path: (path / "optimizer.pt").unlink(),
        "scheduler.pt has": lambda path: (path / "scheduler.pt").write_bytes(b""),
        "no manifest": lambda path: (path / "manifest.json").unlink(),
    }
    for words, damage in damages.items():
        copy = tmp_path / "checkpoint-40"
        shutil.copytree(finished / "checkpoint-40", copy)
        damage(copy)
        assert words in str(checkpoints.problem(copy))
        assert checkpoints.newest_good(tmp_path)[0] is None
        shutil.rmtree(copy)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_checkpoint_loads_with_no_code_of_ours(finished, tmp_path):
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline\n"
        "path = sys.argv[1]\n"
        "model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)\n"
        "assert model.config.use_cache and len(tokenizer) == model.config.vocab_size == 4096\n"
        "text = pipeline('text-generation', model=path)('The river', max_new_tokens=5, do_sample=False)\n"
        "assert text[0]['generated_text'].startswith('The river'), text\n"
        "assert not [name for name in sys.modules if name.startswith('slimpajama')]\n"
    )
    path = str(finished / "checkpoint-40")
    env = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (finished / "checkpoint-40" / "training_args.bin").exists()


def test_the_screen_said_the_plan_the_steps_and_the_summary(finished):
    text = (finished.parent / "stderr.txt").read_text()
    for words in ("corpus", "tokenizer", "parameters", "memory", "float32", "warm-up", str(finished)):
        assert words in text
    line = (
        r"Training:  *\d+%\|.*\| \d+/40 \[\d\d:\d\d<\d\d:\d\d, loss=\d+\.\d{4}, acc=\d+\.\d%, tps=\d+\.\d, "
        r"lr=\d\.\d\de-\d\d, eta=[\d.]+[smh]\]"
    )
    assert re.search(line, text)
    assert "100%|██████████| 40/40" in text
    columns = read_columns(finished / "ledger.jsonl")
    assert f"{columns.loss.mean():.4f}" in text and f"{columns.prequential_bits_per_byte():.4f} bits per byte" in text
    assert "training_latest.png" in text and "checkpoint-40" in text


def test_a_folder_that_holds_a_run_is_not_overwritten_by_accident(finished, shards):
    before = (finished / "ledger.jsonl").read_bytes()
    done = run_script(*NANO, "--dataset", f"{shards}/*", "--max_steps", "5", "--output_dir", str(finished))
    assert done.returncode == 1
    assert "--resume_from_checkpoint true" in done.stderr and "--overwrite_output_dir" in done.stderr
    assert (finished / "ledger.jsonl").read_bytes() == before


def flags_for(shards: Path, run: Path, steps: int, *more: str) -> list[str]:
    return [*NANO, "--dataset", f"{shards}/*.jsonl.zst", "--max_steps", str(steps), "--output_dir", str(run), *more]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
@pytest.mark.long
def test_a_signal_ends_the_run_with_everything_saved_and_it_goes_on(tmp_path, encoder, number, code):
    """Stopped in the middle, resumed: ledger, samples and weights are those of a run that was never stopped."""
    write_records(tmp_path / "data" / "a.jsonl.zst", make_records(400))
    flags = ["--display_samples", "25", "--viz_interval", "1000", "--save_steps", "1000", "--warmup_steps", "30"]
    run = tmp_path / "stopped"
    process = start_script(*flags_for(tmp_path / "data", run, 300, *flags), stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not _has_rows(run, 20):
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == code, stderr
    (step,) = checkpoints.steps(run)
    assert 20 <= step < 300
    assert (
        len(read_ledger(run))
        == step
        == len(json.loads((run / "training_viz/metrics_history.json").read_text())["steps"])
    )
    assert (run / "training_viz" / f"training_step_{step:06d}.png").exists()
    assert "stopped by" in stderr and "--resume_from_checkpoint true" in stderr and "Traceback" not in stderr

    done = run_script(*flags_for(tmp_path / "data", run, 300, *flags, "--resume_from_checkpoint", "true"))
    assert done.returncode == 0, done.stderr
    if number == signal.SIGINT:
        whole = tmp_path / "whole"
        assert run_script(*flags_for(tmp_path / "data", whole, 300, *flags)).returncode == 0
        clock = {"throughput", "step_seconds"}
        left, right = (
            [{k: v for k, v in row.items() if k not in clock} for row in read_ledger(each)] for each in (run, whole)
        )
        assert left == right
        for name in ("model.safetensors", "trainer_state.json"):
            assert (run / "checkpoint-300" / name).read_bytes() == (whole / "checkpoint-300" / name).read_bytes(), name
        samples = [(each / "training_viz/text_samples.json").read_text() for each in (run, whole)]
        assert samples[0] == samples[1]


def _has_rows(run: Path, count: int) -> bool:
    path = run / "ledger.jsonl"
    return path.exists() and path.read_bytes().count(b"\n") >= count


@pytest.mark.long
def test_a_corpus_that_ends_is_a_clear_stop(tmp_path):
    write_records(tmp_path / "a.jsonl", make_records(7))
    run = tmp_path / "run"
    done = run_script(*NANO, "--dataset", str(tmp_path / "a.jsonl"), "--max_steps", "50", "--output_dir", str(run))
    assert done.returncode == 0, done.stderr
    assert "the corpus ended: 7 steps" in done.stderr
    assert checkpoints.steps(run) == [7]
    assert len(read_ledger(run)) == 7


@pytest.mark.long
def test_a_stream_that_breaks_saves_what_was_learned_and_exits_1(tmp_path):
    path = write_records(tmp_path / "a.jsonl.zst", make_records(300))
    path.write_bytes(path.read_bytes()[:-2000])
    run = tmp_path / "run"
    done = run_script(
        *NANO, "--dataset", str(path), "--max_steps", "300", "--output_dir", str(run), "--viz_interval", "1000"
    )
    assert done.returncode == 1
    assert "truncated" in done.stderr and "Traceback" not in done.stderr
    (step,) = checkpoints.steps(run)
    assert len(read_ledger(run)) == step > 0
    assert (run / "training_viz" / "training_latest.png").exists()


@pytest.mark.long
def test_no_checkpoint_saves_nothing_but_metrics_and_nan_stays_visible(tmp_path):
    """A learning rate that blows the weights up: losses that are no number are kept as that, and end the run."""
    write_records(tmp_path / "a.jsonl", make_records(30))
    run = tmp_path / "run"
    done = run_script(
        *NANO, "--dataset", str(tmp_path / "a.jsonl"), "--max_steps", "25", "--learning_rate", "1e38", "--warmup_steps", "0",
        "--no-checkpoint", "--display_samples", "6", "--output_dir", str(run),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "10 steps in a row" in done.stderr and "(step 10)" in done.stderr and "--learning_rate" in done.stderr
    assert checkpoints.steps(run) == []
    losses = [row["loss"] for row in read_ledger(run)]
    assert losses[0] == pytest.approx(math.log(4096), abs=0.3)
    assert losses[-1] is None
    history = json.loads((run / "training_viz/metrics_history.json").read_text())
    assert history["loss"] == losses
    assert "loss=nan" in done.stderr


@pytest.mark.first(4)
@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--dataset", "missing.jsonl"], 1, "no such file"),
        (["--dataset", "slimpajama_hf"], 1, "no file in this folder can be read; it holds"),
        (["--dataset", "{html}"], 1, "an HTML page"),
        (["--tokenizer", "{model}"], 1, "html.model"),
        (["--gpu", "9"], 1, "--gpu 9: there"),
        (["--output_dir", "/proc/nowhere"], 1, "cannot be written"),
        (["--model", "giant"], 1, "expected tiny, small, medium"),
        (["--config_overrides", "n_head=3"], 1, "divisible"),
        (["--config_overrides", "n_heads=3"], 1, "no n_heads"),
        (["--max_seq_length", "4096"], 1, "1024 positions"),
        (["--max_steps", "0"], 2, "--max_steps 0"),
        (["--resume_from_checkpoint", "nowhere/checkpoint-5"], 1, "no such folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_sentence(tmp_path, cache, flags, code, words):
    html = tmp_path / "html.jsonl.zst"
    html.write_text("<html>not found</html>")
    model = tmp_path / "html.model"
    model.write_text("<html>not found</html>")
    flags = [flag.format(html=html, model=model) for flag in flags]
    base = ["--test", "--max_steps", "2", "--output_dir", str(tmp_path / "run")]
    done = run_script(*base, *flags)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1


def test_views_can_be_made_again_from_the_ledger_alone(finished, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(finished, copy, ignore=shutil.ignore_patterns("checkpoint-*", "training_viz"))
    done = run_command("views", str(copy))
    assert done.returncode == 0, done.stderr
    for name in ("metrics_history.json", "text_samples.json"):
        assert (copy / "training_viz" / name).read_bytes() == (finished / "training_viz" / name).read_bytes()


@pytest.mark.parametrize("place", ["", "checkpoint-40"])
def test_generate_writes_what_the_model_writes(finished, encoder, place):
    done = run_command("generate", str(finished / place), "--prompt", "The river of", "--new_tokens", "8")
    assert done.returncode == 0, done.stderr
    prompt = encoder.encode("The river of")[0]
    ids = torch.tensor([prompt])
    model = load(finished / "checkpoint-40")
    written = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)[0].tolist()
    assert done.stdout == encoder.decode(written) + "\n"


@pytest.mark.long
def test_a_tokenizer_is_trained_by_one_command_and_used(shards, tmp_path):
    output = tmp_path / "mine"
    done = run_command(
        "tokenizer", "--dataset", f"{shards}/*", "--kind", "byte-bpe", "--vocab_size", "300", "--output", str(output)
    )
    assert done.returncode == 0, done.stderr
    flags = [*NANO[:-1], str(output), "--max_steps", "3", "--output_dir", str(tmp_path / "run"), "--no-checkpoint"]
    done = run_script("--dataset", f"{shards}/*", *flags)
    assert done.returncode == 0, done.stderr
    assert read_ledger(tmp_path / "run")[0]["loss"] == pytest.approx(math.log(300), abs=0.3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="accelerate launch is tried on POSIX")
def test_accelerate_launch_runs_the_script(shards, tmp_path):
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "run_clm_slimpajama.py",
         *flags_for(shards, run, 4, "--no-checkpoint")],
        capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(read_ledger(run)) == 4


@pytest.mark.slow
def test_another_number_of_threads_is_said_and_the_command_that_goes_on_names_the_runs_own(shards, tmp_path):
    run = tmp_path / "run"
    flags = [*NANO, "--dataset", f"{shards}/*.jsonl.zst", "--save_steps", "3", "--output_dir", str(run)]
    assert run_script(*flags, "--max_steps", "3", OMP_NUM_THREADS="1").returncode == 0
    record = json.loads((run / "run.json").read_text())
    assert run_folder.resume_command(run, record).startswith(
        "accelerate launch --num_cpu_threads_per_process 1 run_clm"
    )
    same = run_script(*flags, "--max_steps", "6", "--resume_from_checkpoint", "true", OMP_NUM_THREADS="1")
    assert same.returncode == 0 and "threads where the run had" not in same.stderr
    other = run_script(*flags, "--max_steps", "9", "--resume_from_checkpoint", "true", OMP_NUM_THREADS="2")
    assert other.returncode == 0 and "2 threads where the run had 1" in other.stderr
    assert "set OMP_NUM_THREADS=1 (accelerate: --num_cpu_threads_per_process 1)" in other.stderr
