"""Several processes, by the launchers that start them: what they learn together, and what happens when one is gone."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from slimpajama_hf import report
from slimpajama_hf.corpus import opening
from slimpajama_hf.errors import UserError
from slimpajama_hf.lookback import forget, fork
from slimpajama_hf.record import checkpoints, ledger
from slimpajama_hf.record.columns import read_columns
from slimpajama_hf.samples.stream import SHORT_TEXT_CHARACTERS, SampleStream
from slimpajama_hf.views import charts, views
from tests.conftest import (
    NANO,
    ROOT,
    a_token_for_each_word,
    environment,
    make_records,
    make_text,
    read_ledger,
    run_command,
    write_records,
)  # fmt: skip

CLOCK = {"throughput", "step_seconds", "chain"}
ACCELERATE = [
    "-m", "accelerate.commands.launch", "--quiet", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no",
    "--dynamo_backend", "no", "--main_process_port", "0",
]  # fmt: skip


def torchrun(processes: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


def accelerate(processes: int) -> list[str]:
    return [*ACCELERATE, "--num_processes", str(processes)]


LAUNCHERS = {"torchrun": torchrun, "accelerate": accelerate}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Four uneven shards, some records of which cannot be used: 67 documents of 3 to 300 words."""
    folder = tmp_path_factory.mktemp("corpus")
    for number, count in enumerate((31, 4, 20, 15)):
        records: list[Any] = make_records(count, seed=10 + number)
        records[1] = {"text": "", "meta": {"redpajama_set_name": "RedPajamaBook"}}
        if number == 2:
            records[7] = {"text": make_text(7, 300), "meta": {"redpajama_set_name": "RedPajamaBook"}}
        write_records(folder / f"{number}.jsonl.zst", records)
    return folder


def flags_of(corpus: Path, run: Path, steps: int, *more: str) -> list[str]:
    return [*NANO, "--dataset", f"{corpus}/*.jsonl.zst", "--max_steps", str(steps), "--output_dir", str(run),
            "--precision", "float32", "--display_samples", "5", "--viz_interval", "0", "--warmup_steps", "10",
            "--save_steps", "10", "--max_seq_length", "64", *more]  # fmt: skip


def start(launcher: list[str], flags: list[str], **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *launcher, "run_clm_slimpajama.py", *flags],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=environment(**more),
        cwd=ROOT,
    )


def launch(launcher: list[str], flags: list[str], **more: str) -> str:
    """Run to the end; what it said."""
    process = start(launcher, flags, **more)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    return said


def documents(run: Path) -> list[tuple]:
    """Every sample that was learned, in the order of the ledger."""
    return [
        (each["shard"], each["row"], each["part"], each["tokens"], each["text_sha1"])
        for row in read_ledger(run)
        for each in ledger.each_sample(row)
    ]


def of_the_corpus(corpus: Path, encoder: Any, mode: str) -> list[tuple]:
    stream = SampleStream(opening.open_corpus(f"{corpus}/*.jsonl.zst"), encoder, mode, 64, read_ahead=0)
    return [(s.document.shard, s.document.row, s.part, len(s.input_ids), s.document.sha1) for s in stream]


def without_clock(run: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in read_ledger(run)]


def assert_verified(run: Path) -> None:
    done = run_command("verify", str(run))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("launcher", "processes", "mode"),
    [
        ("torchrun", 2, "window"),
        pytest.param("accelerate", 3, "truncate", marks=pytest.mark.slow),
        pytest.param("torchrun", 3, "pack", marks=pytest.mark.slow),
    ],
)
@pytest.mark.long
def test_every_document_is_learned_once_by_one_of_them(corpus, encoder, tmp_path, launcher, processes, mode):
    run = tmp_path / "run"
    said = launch(LAUNCHERS[launcher](processes), flags_of(corpus, run, 500, "--sample_mode", mode))
    expected = of_the_corpus(corpus, encoder, mode)
    assert documents(run) == expected
    rows = read_ledger(run)
    assert [row["step"] for row in rows] == list(range(-(-len(expected) // processes)))
    for row in rows:
        assert [each["rank"] for each in row["samples"]] == list(range(len(row["samples"])))
        predicted = [each["tokens"] - 1 for each in row["samples"]]
        mean = sum(each["loss"] * count for each, count in zip(row["samples"], predicted, strict=True)) / sum(predicted)
        assert row["loss"] == pytest.approx(mean, rel=1e-6)
        assert row["tokens"] == sum(predicted) + len(predicted)
    assert len(rows[-1]["samples"]) == len(expected) - processes * (len(rows) - 1)
    assert sum(row["skipped"].get("empty", 0) for row in rows) == 4
    # One of them speaks.
    assert said.count("the corpus ended: ") == 1 and f"{processes} documents each" in said
    assert_verified(run)


@pytest.mark.slow
def test_a_long_text_of_one_token_takes_an_empty_place_that_is_counted(tmp_path):
    """Its owner alone finds out: read and passed over are together what was written, whoever goes on with it."""
    texts = [make_text(number, 12) for number in range(30)]
    one_word = "x" * (SHORT_TEXT_CHARACTERS + 1)
    for place in (1, 7, 13, 14, 15, 22):
        texts[place] = one_word
    write_records(tmp_path / "a.jsonl", [{"text": text} for text in [*texts, ""]])
    a_token_for_each_word().save_pretrained(tmp_path / "words")
    run = tmp_path / "run"
    flags = [*flags_of(tmp_path, run, 100), "--tokenizer", str(tmp_path / "words"), "--dataset", f"{tmp_path}/a.jsonl"]
    launch(torchrun(3), [*flags, "--max_steps", "3"])
    said = launch(torchrun(2), [*flags, "--resume_from_checkpoint", "true"])
    rows = read_ledger(run)
    assert [each["row"] for row in rows for each in row["samples"]] == [
        number for number, text in enumerate(texts) if text is not one_word
    ]
    passed_over = sum(row["skipped"].get("fewer than 2 tokens", 0) for row in rows)
    assert passed_over == 6 and any(len(row["samples"]) < 3 for row in rows[:3])
    record = json.loads((run / "run.json").read_text())
    assert record["skipped_after_last_step"] == {"empty": 1} and record["short_text_characters"] == 128
    assert "1 empty" in said and "fewer than 2 tokens" in said
    assert_verified(run)


@pytest.fixture(scope="module")
def two(corpus, tmp_path_factory) -> Path:
    """A run of two processes, 30 steps."""
    run = tmp_path_factory.mktemp("runs") / "two"
    launch(torchrun(2), flags_of(corpus, run, 30))
    return run


def test_two_processes_learn_what_one_learns_from_two_documents_a_step(corpus, two, tmp_path):
    run = tmp_path / "run"
    said = launch([], flags_of(corpus, run, 30, "--gradient_accumulation_steps", "2"))
    assert "arXiv 2507.07101" in said
    assert documents(run) == documents(two)
    for left, right in zip(read_ledger(run), read_ledger(two), strict=True):
        for name in ("loss", "grad_norm"):
            assert left[name] == pytest.approx(right[name], rel=2e-4, abs=1e-6), (left["step"], name)
        # Of two logits that are as good as equal either may be the greatest.
        assert abs(left["accuracy"] - right["accuracy"]) * (left["tokens"] - 2) < 1.5
    # Where a gradient is next to nothing Adam moves by its sign, and Muon makes small directions as long as large ones:
    # weights part by more than rounding, and by little beside what twenty steps move.
    one, both = (load_file(each / "checkpoint-30/model.safetensors") for each in (run, two))
    before = load_file(run / "checkpoint-10/model.safetensors")
    for name, weight in one.items():
        assert (weight - both[name]).norm() < 0.05 * (weight - before[name]).norm(), name
    assert_verified(run)


@pytest.mark.slow
def test_gradients_in_bfloat16_are_nearly_the_same_and_refused_where_none_are_sent(corpus, two, tmp_path):
    run = tmp_path / "run"
    said = launch(torchrun(2), flags_of(corpus, run, 30, "--reduce_dtype", "bfloat16"))
    assert "backward  written out for GPT-2, gradients summed over the processes in bfloat16" in said
    # What takes long is said after 2 seconds: by one of them.
    assert len(re.findall(r"loading torch and transformers \((?:1|2)\.\ds\)", said)) <= 1
    pairs = list(zip(read_ledger(run), read_ledger(two), strict=True))
    assert all(left["loss"] == pytest.approx(right["loss"], rel=5e-3) for left, right in pairs)
    assert any(left["loss"] != right["loss"] for left, right in pairs)
    for launcher, more, why in (
        ([], [], "one process sends no gradients"),
        (torchrun(2), ["--backward", "autograd"], "the step is autograd's (--backward autograd)"),
    ):
        process = start(launcher, flags_of(corpus, tmp_path / why[:3], 30, "--reduce_dtype", "bfloat16", *more))
        _, said = process.communicate(timeout=200)
        # torchrun adds a traceback of its own.
        assert process.returncode == 1 and said.count(f"error: --reduce_dtype bfloat16: {why}") == 1


def test_messages_sum_the_same_gradients_as_shared_memory(corpus, two, tmp_path):
    """Where one process does not see the other's memory, the sums go over sockets. Their norms are added otherwise."""
    assert json.loads((two / "run.json").read_text())["model"]["gradients_summed_by"].startswith("memory")
    patch = tmp_path / "patch"
    patch.mkdir()
    (patch / "sitecustomize.py").write_text("import os\nif os.environ.get('RANK') == '1':\n    del os.memfd_create\n")
    run = tmp_path / "run"
    said = launch(torchrun(2), flags_of(corpus, run, 30), PYTHONPATH=os.pathsep.join([str(patch), str(ROOT)]))
    assert "gradients summed by messages" in said
    for left, right in zip(read_ledger(run), read_ledger(two), strict=True):
        near = 1e-6 if left["step"] == 0 else 2e-4
        assert (left["loss"], left["grad_norm"]) == pytest.approx((right["loss"], right["grad_norm"]), rel=near)
    # Goes on in the other way, and says so.
    said = launch(torchrun(2), flags_of(corpus, run, 35, "--resume_from_checkpoint", "true"))
    words = "gradients are summed by memory that the processes share where the run had messages"
    assert f"{words}: it goes on exactly, but not bit for bit" in said
    assert_verified(run)


def test_the_gradient_of_a_step_is_that_of_the_mean_over_its_tokens(corpus, two, encoder):
    """By hand: one loss over all predicted tokens of the first step's two documents, at the weights it began with."""
    from slimpajama_hf.model import presets

    stream = SampleStream(opening.open_corpus(f"{corpus}/*.jsonl.zst"), encoder, "truncate", 64, read_ahead=0)
    samples = [next(each) for each in [iter(stream)] for _ in range(2)]
    config = presets.model_config("tiny", "n_layer=1,n_embd=32,n_head=2", encoder.tokenizer, 64)
    gpt = presets.build(config, seed=json.loads((two / "run.json").read_text()).get("seed", 42))
    nats = []
    for sample in samples:
        ids = torch.tensor([sample.input_ids])
        logits = gpt(input_ids=ids).logits[0, :-1]
        nats.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    loss = torch.cat(nats).mean()
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in gpt.parameters()]).norm().item()
    row = read_ledger(two)[0]
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)


def wait_for_rows(run: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "ledger.jsonl").exists() and (run / "ledger.jsonl").read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.01)
    raise AssertionError(f"{run} did not reach {count} rows: {process.communicate()[1]}")


def ranks_of(run: Path) -> list[int]:
    """Process numbers of the run's processes."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            environ = (folder / "environ").read_bytes().split(b"\0")
            ours = b"run_clm_slimpajama.py" in words and str(run).encode() in words
            if ours and any(each.startswith(b"RANK=") for each in environ):
                found.append(
                    (int(next(e for e in environ if e.startswith(b"RANK=")).partition(b"=")[2]), int(folder.name))
                )
    return [pid for _, pid in sorted(found)]


@pytest.mark.slow
def test_a_signal_to_the_launcher_stops_all_after_the_same_step_and_it_goes_on_exactly(corpus, tmp_path):
    run, unbroken = tmp_path / "run", tmp_path / "unbroken"
    more = ["--epochs", "10", "--shuffle_buffer", "20", "--save_steps", "100000"]
    launch(torchrun(2), flags_of(corpus, unbroken, 150, *more))
    process = start(torchrun(2), flags_of(corpus, run, 150, *more))
    wait_for_rows(run, 5, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert "stopped by Ctrl-C" in said, said
    (step,) = checkpoints.steps(run)
    assert 5 <= step < 150 and len(read_ledger(run)) == step
    assert {f"rng_state_{rank}.pth" for rank in (0, 1)} <= {
        path.name for path in (run / f"checkpoint-{step}").iterdir()
    }
    said = launch(torchrun(2), flags_of(corpus, run, 150, *more, "--resume_from_checkpoint", "true"))
    assert f"at step {step}" in said
    assert without_clock(run) == without_clock(unbroken)
    left, right = (load_file(each / "checkpoint-150/model.safetensors") for each in (run, unbroken))
    assert all(torch.equal(weight, right[name]) for name, weight in left.items())


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_that_is_killed_ends_the_job_and_it_goes_on_with_fewer(corpus, encoder, tmp_path, rank):
    run = tmp_path / "run"
    process = start(torchrun(3), flags_of(corpus, run, 500, "--save_steps", "4"))
    wait_for_rows(run, 8, process)
    os.kill(ranks_of(run)[rank], signal.SIGKILL)
    before = time.monotonic()
    _, said = process.communicate(timeout=90)
    assert process.returncode != 0 and time.monotonic() - before < 60
    assert "--resume_from_checkpoint true" in said, said
    for _ in range(100):
        if not ranks_of(run):
            break
        time.sleep(0.1)
    assert not ranks_of(run)
    said = launch(torchrun(2), flags_of(corpus, run, 500, "--resume_from_checkpoint", "true"))
    assert "2 processes where the run had 3" in said
    assert documents(run) == of_the_corpus(corpus, encoder, "truncate")
    assert_verified(run)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["truncate", "pack"])
def test_three_then_two_then_three_with_a_kill_between_learn_every_document_once(encoder, tmp_path, mode):
    corpus, run = tmp_path / "corpus", tmp_path / "run"
    corpus.mkdir()
    for number in range(3):
        write_records(corpus / f"{number}.jsonl.zst", make_records(150, seed=20 + number))
    flags = flags_of(corpus, run, 5000, "--save_steps", "4", "--sample_mode", mode, "--resume_from_checkpoint", "true")
    rows, sizes = 0, []
    for processes, rank in ((3, 1), (2, 0)):
        process = start(torchrun(processes), flags)
        # Behind its first checkpoint.
        wait_for_rows(run, rows + 6, process)
        os.kill(ranks_of(run)[rank], signal.SIGKILL)
        process.communicate(timeout=90)
        assert process.returncode != 0
        while ranks_of(run):
            time.sleep(0.1)
        rows = len((run / "ledger.jsonl").read_bytes().splitlines())
    launch(torchrun(3), flags)
    assert documents(run) == of_the_corpus(corpus, encoder, mode)
    for row in read_ledger(run):
        sizes += [len(row["samples"])] if not sizes or sizes[-1] != len(row["samples"]) else []
    # The last step has what is left.
    assert sizes[:3] == [3, 2, 3], sizes
    assert_verified(run)


@pytest.mark.slow
def test_two_launches_are_two_machines(corpus, two, tmp_path):
    run = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = str(ROOT / "configs/accelerate/two_machines.yaml")
    machines = [
        start(
            ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", "2", "--machine_rank",
             str(number), "--main_process_ip", "127.0.0.1", "--main_process_port", str(port), "--quiet"],
            flags_of(corpus, run, 30, "--eval_steps", "15", "--eval_dataset", f"{corpus}/1.jsonl.zst"),
        )
        for number in range(2)
    ]  # fmt: skip
    said = [machine.communicate(timeout=200)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert without_clock(run) == without_clock(two)
    assert "done: 30 steps" in said[0] and "done:" not in said[1]
    assert [json.loads(line)["step"] for line in (run / "evaluations.jsonl").read_text().splitlines()] == [15, 30]


@pytest.mark.slow
def test_what_the_first_refuses_is_said_once(two, corpus):
    process = start(torchrun(2), flags_of(corpus, two, 30))
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert said.count("error: ") == 1 and "holds a run already" in said
    process = start(torchrun(2), ["--max_steps", "ten"])
    _, said = process.communicate(timeout=60)
    assert said.count("error: --max_steps: found 'ten', expected a whole number") == 1


@pytest.mark.slow
def test_chart_and_report_say_how_many_documents_a_step_has(two):
    record, columns = json.loads((two / "run.json").read_text()), read_columns(two / "ledger.jsonl")
    assert views.caption_of(record)[1].endswith("2 documents a step")
    counted = f"{len(documents(two)):,} documents"
    assert charts.headline(columns, 30)[5][2] == counted
    assert report.write(two).read_text().count(f"<span>{counted}</span>") == 1


def test_a_step_of_several_documents_is_inspected_document_by_document(two):
    done = [run_command("inspect", str(two), "--step", "7", "--json", *more) for more in ([], ["--sample", "1"])]
    row = read_ledger(two)[7]
    for found, sample in zip(done, row["samples"], strict=True):
        assert found.returncode == 0, found.stderr
        answer = json.loads(found.stdout)
        assert answer["documents"][0]["text_sha1"] == sample["text_sha1"]
        assert answer["then"]["loss"] == pytest.approx(sample["loss"], rel=1e-5)
        assert len(answer["tokens"]) == sample["tokens"]
    missing = run_command("inspect", str(two), "--step", "7", "--sample", "2")
    assert missing.returncode == 1 and "has samples 0 to 1" in missing.stderr


def test_a_fork_pairs_each_document_of_a_step_and_forget_refuses_such_steps(two, tmp_path):
    pairs = fork._paired({"a": two, "b": two}, 10, 20)
    samples = [sample for row in read_ledger(two)[10:] for sample in row["samples"]]
    assert [(pair.domain, pair.a, pair.difference) for pair in pairs] == [
        (sample["domain"], sample["loss"], 0.0) for sample in samples
    ]
    second = read_ledger(two)[15]["samples"][1]
    with pytest.raises(UserError, match="some of its steps hold several documents"):
        forget.forget(two, [f"{second['shard']}#{second['row']}"], str(tmp_path / "without"))
    assert not (tmp_path / "without").exists()


@pytest.mark.slow
def test_a_run_of_two_processes_is_replayed_by_two(two):
    done = run_command("verify", str(two), "--replay", "12:16")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bit-equal" in done.stdout


@pytest.mark.long
def test_a_sharded_model_trains_saves_whole_and_goes_on(corpus, two, tmp_path):
    """FSDP2 over two processes computes what copies compute, and its checkpoints load anywhere."""
    from transformers import AutoModelForCausalLM

    run = tmp_path / "run"
    launcher = [
        "-m",
        "accelerate.commands.launch",
        "--quiet",
        "--config_file",
        str(ROOT / "configs/accelerate/fsdp2.yaml"),
    ]
    said = launch(launcher, flags_of(corpus, run, 20, "--eval_steps", "10", "--eval_dataset", f"{corpus}/1.jsonl.zst"))
    assert "no samples" in said and "sample @" not in said and "failed" not in said
    assert [json.loads(line)["step"] for line in (run / "evaluations.jsonl").read_text().splitlines()] == [10, 20]
    launch(launcher, flags_of(corpus, run, 30, "--resume_from_checkpoint", "true"))
    assert documents(run) == documents(two)
    for left, right in zip(read_ledger(run), read_ledger(two), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-3), left["step"]
    model = AutoModelForCausalLM.from_pretrained(run / "checkpoint-30")
    whole = load_file(two / "checkpoint-30/model.safetensors")
    for name, weight in model.state_dict().items():
        if name in whole:
            torch.testing.assert_close(weight, whole[name], rtol=2e-2, atol=2e-3)


@pytest.mark.slow
def test_a_launcher_with_one_process_trains(tmp_path):
    run = tmp_path / "run"
    launch(torchrun(1), ["--test", "--max_steps", "2", "--output_dir", str(run)])
    assert len(read_ledger(run)) == 2 and not read_ledger(run)[0]["samples"]
