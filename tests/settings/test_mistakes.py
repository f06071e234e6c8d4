"""What libraries answer with a traceback, or not at all, is one sentence: odd values, environments, closed files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from slimpajama_hf import devices
from slimpajama_hf.errors import UsageError, UserError
from slimpajama_hf.session import command_line, resume
from tests.conftest import NANO, ROOT, environment, read_ledger, run_command, run_script

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="a file that even root cannot read")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--seed", "-1"], "--seed -1: expected a whole number from 0 to 4294967295"),
        (["--seed", "4294967296"], "--seed 4294967296: expected a whole number from 0"),
        (["--learning_rate", "nan"], "--learning_rate nan: expected a number above 0"),
        (["--learning_rate", "inf"], "--learning_rate inf: expected a number above 0"),
        (["--learning_rate", "-0.1"], "--learning_rate -0.1: expected a number above 0"),
        (["--warmup_steps", "nan"], "--warmup_steps nan: expected a number of steps"),
        (["--warmup_steps", "inf"], "--warmup_steps inf: expected a number of steps"),
        (["--weight_decay", "nan"], "--weight_decay nan: expected a number, 0 or more"),
        (["--weight_decay", "-1"], "--weight_decay -1: expected a number, 0 or more"),
        (["--adam_beta1", "1.5"], "--adam_beta1 1.5: expected a number from 0 to below 1"),
        (["--adam_beta2", "nan"], "--adam_beta2 nan: expected"),
        (["--adam_epsilon", "-1"], "--adam_epsilon -1: expected"),
        (["--max_grad_norm", "-1"], "--max_grad_norm -1: expected the longest gradient, or 0 to clip none"),
        (["--max_grad_norm", "nan"], "--max_grad_norm nan: expected"),
        (["--neftune_noise_alpha", "nan"], "--neftune_noise_alpha nan: expected"),
        (["--save_total_limit", "0"], "--save_total_limit 0: expected the number of checkpoints to keep, 1 or more"),
        (["--save_total_limit", "-1"], "--save_total_limit -1: expected"),
        (["--save_steps", "nan"], "--save_steps nan: expected a number of steps above 0"),
        (["--eval_steps", "0"], "--eval_steps 0: expected a number of steps above 0"),
        (["--eval_steps", "-3"], "--eval_steps -3: expected"),
        (["--ddp_timeout", "-1"], "--ddp_timeout -1: expected seconds"),
        (["--use_liger_kernel", "true"], "--use_liger_kernel: liger-kernel is not installed"),
        (["--optim", "adafactor", "--optim_args", "foo"], "--optim_args foo: expected name=value"),
        (["--gradient_checkpointing_kwargs", "[1]"], "--gradient_checkpointing_kwargs [1]: expected a JSON object"),
        (["--torch_compile_backend", "foo"], "--torch_compile_backend foo: expected "),
        (["--output_dir", ""], "--output_dir: there is nothing after it"),
        (["--output_dir="], "--output_dir: there is nothing after it"),
        (["--resume-from-checkpoint", ""], "--resume_from_checkpoint: there is nothing after it"),
        (["--text_column", ""], "--text_column: there is nothing after it"),
        (["--config", "configs"], "--config configs: a folder"),
        pytest.param(["--config", "/proc/self/mem"], "--config /proc/self/mem: cannot be read", marks=LINUX),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_an_odd_value_is_one_sentence(flags, said):
    with pytest.raises(UsageError) as caught:
        command_line.parse(flags)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_an_empty_value_in_a_file_names_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("dataset: ''\n")
    with pytest.raises(UsageError, match=rf"^{path}: --dataset: there is nothing after it"):
        command_line.parse(["--config", str(path)])


def test_values_at_the_edge_are_taken():
    command_line.parse(
        ["--seed", "0", "--max_grad_norm", "0", "--warmup_steps", "1e9", "--adam_beta1", "0", "--adam_beta2", "0"]
    )
    command_line.parse(["--seed", "4294967295", "--save_total_limit", "1", "--config_overrides=n_layer=1"])


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE= (an environment variable): expected a whole number"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two (an environment variable): expected a whole number"),
        ({"RANK": ""}, "RANK= (an environment variable): expected a whole number"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK=x (an environment variable): expected a whole number"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0 (an environment variable) without WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 (an environment variable) without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "RANK=2 (an env"),
        ({"ACCELERATE_USE_CPU": "maybe"}, "ACCELERATE_USE_CPU=maybe (an environment variable): expected true or false"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)  # fmt: skip
def test_a_launchers_variable_that_cannot_be_is_one_sentence(monkeypatch, variables, said):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        devices.prepare_processes()
    assert str(caught.value).startswith(said)


def test_the_sentence_comes_out_where_the_variable_is_asked_again(tmp_path):
    """On the way out too it is asked whether there are several processes."""
    done = run_script("--test", "--output_dir", str(tmp_path / "run"), WORLD_SIZE="")
    assert done.returncode == 1 and done.stderr.startswith("error: WORLD_SIZE= "), done.stderr
    assert "Traceback" not in done.stderr


SHORT = [*NANO, "--max_seq_length", "16", "--max_steps", "2", "--viz_interval", "1000", "--no-checkpoint"]


def test_a_stream_needs_no_cache_of_the_hub(shards, tmp_path):
    (tmp_path / "file").write_text("")
    run = tmp_path / "run"
    flags = [*SHORT, "--dataset", f"{shards}/*.jsonl.zst", "--output_dir", str(run)]
    done = run_script(*flags, HF_HOME=str(tmp_path / "file" / "below"))
    assert done.returncode == 0, done.stderr
    assert len(read_ledger(run)) == 2


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_a_run_without_a_screen_is_whole(shards, tmp_path, closed):
    """What is opened next would become file 2, and take in what libraries write to the screen."""
    run = tmp_path / "run"
    flags = [*SHORT, "--dataset", f"'{shards}/*.jsonl.zst'", "--output_dir", str(run)]
    command = f"{sys.executable} {ROOT}/run_clm_slimpajama.py {' '.join(flags)} {closed}"
    done = subprocess.run(["sh", "-c", command], env=environment(), cwd=ROOT, timeout=200)
    assert done.returncode == 0
    assert len(read_ledger(run)) == 2 and (run / "training_viz/training_latest.png").is_file()
    verified = run_command("verify", str(run))
    assert verified.returncode == 0, verified.stdout


def test_help_into_a_closed_output_and_into_a_pipe_that_nobody_reads():
    script = f"{sys.executable} {ROOT}/run_clm_slimpajama.py --help"
    done = subprocess.run(["sh", "-c", f"{script} >&-"], env=environment(), stderr=subprocess.PIPE, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    command = f"exec 3>&1; {{ sleep 1; {script}; echo $? >&3; }} | true"
    done = subprocess.run(["bash", "-c", command], env=environment(), capture_output=True, timeout=60)
    assert (done.stdout, done.stderr) == (b"141\n", b"")


def test_the_folder_of_a_run_is_no_checkpoint_and_the_flags_for_it_are_named(finished: Path, tmp_path):
    said = f"to go on with it: --output_dir {finished} --resume_from_checkpoint true"
    with pytest.raises(UserError, match=said):
        resume.refuse_run_folder(str(finished))
    for more in ([], ["--output_dir", str(finished)], ["--output_dir", str(tmp_path / "other")]):
        with pytest.raises(UserError, match=said):
            command_line.parse(["--resume_from_checkpoint", str(finished), *more])
    assert not (tmp_path / "other").exists()


def test_an_optimizer_that_is_not_installed_is_one_sentence(shards, tmp_path):
    flags = [*SHORT, "--dataset", f"{shards}/*.jsonl.zst", "--output_dir", str(tmp_path / "run")]
    done = run_script(*flags, "--optim", "galore_adamw", "--optim_target_modules", "mlp")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert sum(line.startswith("error: You need to install `galore_torch`") for line in done.stderr.splitlines()) == 1
