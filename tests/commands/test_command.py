"""The installed command `slimpajama-hf`: completion by real shells, the schema of configurations, what an installation holds."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from importlib.metadata import version
from typing import Any

import jsonschema
import pytest
import yaml

from slimpajama_hf.errors import UsageError
from slimpajama_hf.settings import flags
from tests.conftest import ROOT, environment, run_command

COMMITTED = ROOT / "configs" / "schema.json"


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
@pytest.mark.long
def test_bash_completes_commands_flags_choices_and_folders(tmp_path):
    done = run_command("completion", "bash")
    assert done.returncode == 0, done.stderr
    script = tmp_path / "completion.bash"
    script.write_text(done.stdout)
    (tmp_path / "runs").mkdir()
    ask = (
        "source completion.bash; COMP_WORDS=({}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); "
        'f=$(complete -p slimpajama-hf | grep -o "_shtab[a-z_]*"); $f slimpajama-hf "${{COMP_WORDS[-1]}}" "${{COMP_WORDS[-2]}}"; '
        'printf "%s\\n" "${{COMPREPLY[@]}}"'
    )

    def completed(*words: str) -> set[str]:
        line = ask.format(" ".join(f"'{word}'" for word in ("slimpajama-hf", *words)))
        found = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=True)
        return set(found.stdout.split())

    assert {"train", "report", "compare", "completion"} <= completed("")
    assert completed("rep") == {"report"}
    assert completed("report", "--w") == {"--watch"}
    assert completed("train", "--max_s") == {"--max_steps", "--max_seq_length"}
    # A flag of transformers' own, and the values of one of ours.
    assert completed("train", "--adam_b") == {"--adam_beta1", "--adam_beta2"}
    assert completed("train", "--sample_mode", "") == {"truncate", "window", "pack"}
    assert completed("report", "ru") == {"runs"}


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish here")
@pytest.mark.long
def test_fish_completes_the_same_and_says_what_each_is(tmp_path):
    (tmp_path / "runs").mkdir()
    done = run_command("completion", "fish")
    assert done.returncode == 0, done.stderr
    (tmp_path / "completion.fish").write_text(done.stdout)

    def completed(line: str) -> dict[str, str]:
        ask = f"source completion.fish; complete -C 'slimpajama-hf {line}'"
        found = subprocess.run(["fish", "-c", ask], cwd=tmp_path, capture_output=True, text=True, check=True)
        return dict(entry.partition("\t")[::2] for entry in found.stdout.splitlines())

    assert {"train", "report", "compare", "completion"} <= completed("").keys()
    assert completed("train --max_s")["--max_seq_length"] == "tokens kept of a document"
    assert completed("train --adam_b").keys() == {"--adam_beta1", "--adam_beta2"}
    assert completed("train --sample_mode ").keys() == {"truncate", "window", "pack"}
    assert "runs/" in completed("report ru")
    # Texts with a percent sign: ours, and transformers'.
    assert " % " in completed("train --viz_in")["--viz_interval"]
    assert "~10% slower" in completed("train --torch_empty")["--torch_empty_cache_steps"]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh here")
@pytest.mark.long
def test_zsh_completes_the_same(tmp_path):
    """Typed into a real one, on a terminal."""
    done = run_command("completion", "zsh")
    assert done.returncode == 0, done.stderr
    (tmp_path / "_slimpajama-hf").write_text(done.stdout)
    process, terminal = pty.fork()
    if process == 0:
        os.environ.update(TERM="dumb", PS1="> ", COLUMNS="200", HOME=str(tmp_path))
        os.chdir(tmp_path)
        os.execvp("zsh", ["zsh", "-f", "-i"])

    def typed(text: str, awaited: str) -> str:
        os.write(terminal, text.encode())
        shown, end = "", time.monotonic() + 20
        while awaited not in shown and time.monotonic() < end:
            if select.select([terminal], [], [], 0.1)[0]:
                shown += os.read(terminal, 2**16).decode("utf-8", "replace")
        return shown

    try:
        typed("fpath=($PWD $fpath); autoload -U compinit; compinit -u -D; LISTMAX=999; print rea''dy\n", "ready")
        assert "GGUF" in typed("slimpajama-hf \t\t", "GGUF"), "the commands, with what each does"
        assert "--max_steps" in typed("\x15slimpajama-hf train --max_st\t", "--max_steps")
        shown = typed("\x15slimpajama-hf train --sample_mode \t\t", "window")
        assert "truncate" in shown and "window" in shown and "pack" in shown
    finally:
        os.close(terminal)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def test_the_committed_schema_is_that_of_the_flags():
    done = run_command("schema")
    assert done.returncode == 0, done.stderr
    made, committed = json.loads(done.stdout), json.loads(COMMITTED.read_text("utf-8"))
    if version("transformers").startswith("5.23"):
        assert made == committed, "python -m slimpajama_hf schema > configs/schema.json"
    assert {"max_steps", "dataset", "watch", "adam_beta2", "steps"} <= made["properties"].keys()
    assert not {"num_train_epochs", "hub_token", "per_device_eval_batch_size"} & made["properties"].keys()


def test_an_editor_accepts_what_the_program_accepts_and_marks_the_rest(finished):
    check = jsonschema.Draft7Validator(json.loads(COMMITTED.read_text("utf-8")))
    jsonschema.Draft7Validator.check_schema(check.schema)
    configs = [*sorted((ROOT / "configs").glob("*.yaml")), finished / "run_config.yaml"]
    for path in configs:
        assert list(check.iter_errors(yaml.safe_load(path.read_text()))) == [], path
    for path in configs[:-1]:
        assert path.read_text().startswith("# yaml-language-server: $schema=schema.json\n")
    wrong: list[dict[str, Any]] = [
        {"max_stepz": 5}, {"max_steps": "ten"}, {"sample_mode": "chop"}, {"no_checkpoint": "perhaps"}, {"num_train_epochs": 5},
        {"learning_rate": "fast"}, {"gpu": 1.5},
    ]  # fmt: skip
    for config in wrong:
        assert len(list(check.iter_errors(config))) == 1, config
        with pytest.raises(UsageError):
            flags.read_flags(flags.config_to_argv(config, "wrong.yaml"))


def test_train_is_the_training_program():
    done = run_command("train", "--max_step", "5")
    assert done.returncode == 2 and "did you mean --max_steps?" in done.stderr
    helped = run_command("train", "--help")
    assert helped.returncode == 0 and "--viz_interval" in helped.stdout


@pytest.mark.slow
def test_an_installation_has_all_that_the_checkout_has_and_trains(tmp_path):
    """The wheel, laid out in a folder of its own: what `pip install .` adds beside the dependencies."""
    source = tmp_path / "source"
    shutil.copytree(
        ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", "tests")
    )
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", str(tmp_path), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    for folder in ("slimpajama_hf", "configs"):
        there = site / ("slimpajama_hf/configs" if folder == "configs" else folder)
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix != ".pyc" and not path.name.endswith(".md"):
                assert (there / path.relative_to(ROOT / folder)).read_bytes() == path.read_bytes(), path
    points = next(site.glob("*.dist-info")) / "entry_points.txt"
    assert "slimpajama-hf = slimpajama_hf.__main__:command" in points.read_text()
    requirements = next(site.glob("*.dist-info/METADATA")).read_text()
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if "==" in line:
            assert f"Requires-Dist: {line.partition(' ')[0].rstrip(';')}" in requirements, line
    program = tmp_path / "slimpajama-hf"
    program.write_text(f"#!{sys.executable}\nfrom slimpajama_hf.__main__ import command\ncommand()\n")
    run = tmp_path / "run"
    flags_of_run = [
        "--test",
        "--max_steps",
        "3",
        "--config_overrides",
        "n_layer=1,n_embd=32,n_head=2",
        "--output_dir",
        str(run),
    ]
    env = environment(PYTHONPATH=str(site))
    done = subprocess.run(
        [sys.executable, str(program), "train", *flags_of_run],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    assert (run / "report.html").is_file() and "done: 3 steps" in done.stderr
    record = json.loads((run / "run.json").read_text())
    assert record["command"][:2] == ["slimpajama-hf", "train"]
    shown = subprocess.run(
        [sys.executable, str(program), "--help"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )
    assert shown.stdout.startswith("usage: slimpajama-hf ")
