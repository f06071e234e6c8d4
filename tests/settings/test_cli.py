"""Flags, configuration files, refusals."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from slimpajama_hf import program
from slimpajama_hf.errors import UsageError, UserError
from slimpajama_hf.session import command_line, resume
from tests.conftest import ROOT, environment, python


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_defaults_are_the_promised_ones():
    settings = command_line.parse([])
    training = settings.training
    assert (training.max_steps, training.save_steps, training.learning_rate) == (10_000, 2000, 1e-3)
    assert training.get_warmup_steps(10_000) == 1000
    assert (settings.data.dataset, settings.data.max_seq_length) == ("slimpajama", 256)
    assert (settings.run.viz_interval, settings.run.display_samples) == (50, 5)
    assert training.per_device_train_batch_size == 1
    assert training.logging_nan_inf_filter is False
    assert settings.typed == frozenset()


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--steps", "7"], "max_steps", 7),
        (["--checkpoint-interval", "9"], "save_steps", 9),
        (["--checkpoint-interval=9"], "save_steps", 9),
        (["--max-steps", "3"], "max_steps", 3),
    ],
)
def test_old_training_flags(flags, name, value):
    assert getattr(command_line.parse(flags).training, name) == value


def test_old_flags_of_ours():
    settings = command_line.parse(
        ["--max-seq-length", "64", "--viz-interval", "3", "--display-samples", "2", "--no-checkpoint"]
    )
    assert settings.data.max_seq_length == 64
    assert (settings.run.viz_interval, settings.run.display_samples) == (3, 2)
    assert settings.training.save_strategy == "no"
    assert {"viz_interval", "display_samples"} <= settings.typed


def test_files_in_order_then_flags(tmp_path):
    first = write(tmp_path / "a.yaml", "max_steps: 11\nseed: 1\nlearning_rate: 0.5\n")
    second = write(tmp_path / "b.yaml", "max_steps: 22\nseed: 2\n")
    settings = command_line.parse(["--seed", "3", "--config", first, f"--config={second}"])
    assert (settings.training.max_steps, settings.training.seed, settings.training.learning_rate) == (22, 3, 0.5)


def test_test_flag_is_its_file_and_a_flag_beside_it_wins():
    settings = command_line.parse(["--test", "--max_steps", "5"])
    assert settings.data.dataset == "embedded"
    assert (settings.run.viz_interval, settings.run.display_samples, settings.training.max_steps) == (25, 10, 5)
    assert command_line.parse(["--test"]).training.max_steps == 100


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_parses(path):
    settings = command_line.parse(["--config", str(path)])
    assert settings.typed


def test_the_resolved_configuration_can_be_fed_back(tmp_path):
    settings = command_line.parse(
        ["--test", "--sample_mode", "pack", "--weight_decay", "0.1", "--eval_steps", "50", "--bf16", "false"]
    )
    again = command_line.parse(["--config", write(tmp_path / "resolved.yaml", settings.to_yaml())])
    assert (again.data, again.model) == (settings.data, settings.model)
    for name in ("max_steps", "weight_decay", "eval_steps", "eval_strategy", "learning_rate", "output_dir", "seed"):
        assert getattr(again.training, name) == getattr(settings.training, name), name
    assert again.to_yaml() == settings.to_yaml()


def test_an_interval_that_nobody_typed_stays_a_default(tmp_path):
    again = command_line.parse(["--config", write(tmp_path / "resolved.yaml", command_line.parse([]).to_yaml())])
    assert not {"viz_interval", "display_samples"} & again.typed


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max_step", "5"], "did you mean --max_steps"),
        (["--lerning_rate", "5"], "did you mean --learning_rate"),
        (["--max_steps", "2.5"], "--max_steps: found '2.5', expected a whole number"),
        (["--learning_rate", "fast"], "--learning_rate: found 'fast', expected a number"),
        (["--max_steps", "0"], "--max_steps 0"),
        (["--max_seq_length", "1"], "--max_seq_length 1"),
        (["--viz_interval", "-1"], "--viz_interval -1"),
        (["--sample_mode", "chop"], "--sample_mode"),
        (["--per_device_train_batch_size", "8"], "one document"),
        (["--gradient_accumulation_steps", "0"], "1 or more"),
        (["--lr_scheduler_type", "cosine"], "warm-up"),
        (["a/b.jsonl"], "quoted"),
        (["--config"], "--config"),
        (["--config", "missing.yaml"], "no such file"),
        (["--max_steps"], "--max_steps"),
    ],
)
def test_one_sentence_for_each_mistake(flags, words):
    with pytest.raises(UsageError, match=words) as caught:
        command_line.parse(flags)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_stepz: 5\n", "did you mean --max_steps"),
        ("max_steps: ten\n", "expected a whole number"),
        ("max_steps: 2.5\n", "expected a whole number"),
        ("- a\n- b\n", "expected `name: value` lines"),
        ("a: [1\n", "not YAML"),
        ("seed: 1\n" * 20_000, "at most"),
        ("max_chunks: 5\n", "use --steps N"),
        ("leave_out: []\n", "leave_out is an empty list"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, text, words):
    path = write(tmp_path / "wrong.yaml", text)
    with pytest.raises(UsageError, match=words) as caught:
        command_line.parse(["--config", path])
    assert path in str(caught.value)


def test_help_is_short_and_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['x', '--help']\n"
        "from slimpajama_hf import program\n"
        "code = program.run(None)\n"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "raise SystemExit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) <= 64
    assert "--dataset" in done.stdout and "TrainingArguments" in done.stdout


README_TEXT = re.sub(r"```.*?```", "", (ROOT / "docs/flags.md").read_text("utf-8"), flags=re.S)
README_FLAGS = re.findall(r"(?<![-\w])--([a-z][a-z0-9_-]*)", README_TEXT)


@pytest.mark.parametrize("words", [["run_clm_slimpajama.py"], ["-m", "slimpajama_hf", "plan"]], ids=" ".join)
def test_help_has_every_flag_of_the_readme(words):
    done = python(*words, "--help")
    assert done.returncode == 0, done.stderr
    listed = set(re.findall(r"^  --(\w+)", done.stdout, re.M))
    others = {"steps", "checkpoint_interval", "quiet", "num_cpu_threads_per_process"}  # old ones, and accelerate's
    assert {flag.replace("-", "_") for flag in README_FLAGS} - others <= listed
    assert len(listed) > 40


def test_a_half_life_in_tokens_is_beta2_and_survives_its_own_configuration(tmp_path):
    flags = ["--beta2_half_life_tokens", "25600", "--max_seq_length", "128"]
    settings = command_line.parse(flags)
    beta2 = settings.training.adam_beta2
    # 200 steps of 128 tokens are one half-life.
    assert beta2**200 == pytest.approx(0.5, rel=1e-12)
    written = settings.to_yaml()
    assert "beta2_half_life_tokens: 25600" in written
    assert "adam_beta2" not in written
    again = command_line.parse(["--config", write(tmp_path / "own.yaml", written)])
    assert again.training.adam_beta2 == beta2
    assert command_line.parse([*flags, "--adam_beta2", repr(beta2)]).training.adam_beta2 == beta2


def test_without_a_half_life_beta2_is_the_flags_own():
    assert command_line.parse([]).training.adam_beta2 == 0.999
    assert command_line.parse(["--adam_beta2", "0.95"]).training.adam_beta2 == 0.95


def test_a_half_life_and_another_beta2_are_refused():
    with pytest.raises(UsageError, match=r"means --adam_beta2 0\.99.* --adam_beta2 0\.95 is given too"):
        command_line.parse(["--beta2_half_life_tokens", "25600", "--adam_beta2", "0.95"])


@pytest.mark.parametrize("half_life", ["0", "-5", "inf", "nan"])
def test_a_half_life_is_a_number_above_0(half_life):
    with pytest.raises(UsageError, match="expected a number of tokens above 0"):
        command_line.parse(["--beta2_half_life_tokens", half_life])


def test_a_resume_that_changes_the_half_life_is_refused(tmp_path):
    own = command_line.parse(["--beta2_half_life_tokens", "25600"])
    changed = command_line.parse(
        ["--config", write(tmp_path / "own.yaml", own.to_yaml()), "--beta2_half_life_tokens", "5120"]
    )
    with pytest.raises(UserError, match=r"--adam_beta2 .* \(begun with "):
        resume.refuse_changes(changed, own)


def test_a_pipe_that_nobody_reads_leaves_the_exit_code_alone():
    """What a dead pipe refused stays in Python's buffer, and would fail again as Python ends: exit code 120."""
    reader, writer = os.pipe()
    program = "import sys; from slimpajama_hf.screen import say; sys.stdin.read(1); say('gone'); say('on'); sys.exit(3)"
    buffered = {name: value for name, value in environment().items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=buffered, cwd=ROOT, stdin=subprocess.PIPE, stderr=writer
    )
    os.close(writer)
    os.close(reader)
    process.communicate(b".", timeout=60)
    assert process.returncode == 3


@pytest.mark.parametrize(("rank", "said", "waited"), [("0", 1, 0), ("1", 0, 1)])
def test_the_first_of_several_processes_is_given_time_to_say_what_is_wrong(monkeypatch, capfd, rank, said, waited):
    """A launcher ends all as soon as one ends badly, and the others may come to it sooner."""
    slept = []
    monkeypatch.setattr(program.time, "sleep", slept.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("sys.argv", ["run_clm_slimpajama.py", "--max_steps", "ten"])
    assert program.run(command_line.parse) == 2
    assert capfd.readouterr().err.count("error: --max_steps") == said
    assert len(slept) == waited
