"""`python -m slimpajama_hf rewind RUN --to N --drop STEP`: all as it was but for one document."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from slimpajama_hf import __main__, terminal
from slimpajama_hf.commands.rewind import show
from slimpajama_hf.errors import UserError
from slimpajama_hf.lookback import checks, replay, rewind
from slimpajama_hf.lookback.rewind import Change
from slimpajama_hf.lookback.run import Run
from slimpajama_hf.record import checkpoints, ledger, surprisals
from slimpajama_hf.session import command_line
from slimpajama_hf.settings import yaml_file
from tests.conftest import NANO, ROOT, environment, make_records, read_ledger, run_command, run_script, write_records
from tests.untrained import make_run


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in ledger.TIME_FIELDS} for row in rows]


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


# ---- nothing left out ----


@pytest.mark.long
def test_with_nothing_left_out_it_is_the_run_bit_for_bit(finished, tmp_path):
    before = contents(finished)
    done = run_command("rewind", str(finished), "--to", "25", "--output_dir", str(tmp_path / "again"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checkpoint-20, 20 steps" in done.stdout and "ok      steps 20 to 39 done again: bit-equal" in done.stdout
    again = tmp_path / "again"
    assert without_times(read_ledger(again)) == without_times(read_ledger(finished))
    weights = "checkpoint-40/model.safetensors"
    assert (again / weights).read_bytes() == (finished / weights).read_bytes()
    assert (again / surprisals.FILE_NAME).read_bytes() == (finished / surprisals.FILE_NAME).read_bytes()
    # A run of its own, whole by all checks, and the old one was not touched.
    assert checks.verify(again).ok, checks.verify(again).lines
    assert Run(again).record["run_id"] != Run(finished).record["run_id"]
    assert Run(again).record["rewound_from"]["step"] == 20
    assert contents(finished) == before


# ---- one document left out ----


@pytest.fixture(scope="module")
def without(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The finished run without the document of step 23, from checkpoint-20 on."""
    folder = tmp_path_factory.mktemp("rewound") / "without"
    done = run_command(
        "rewind", str(finished), "--to", "23", "--drop", "23", "--steps", "12", "--output_dir", str(folder), "--json"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout), folder


def test_what_follows_is_compared_document_by_document(finished, without):
    found, folder = without
    old, new = read_ledger(finished), read_ledger(folder)
    assert found["ok"] and found["started_at"] == 20 and found["repeated_steps"] == 3
    assert found["left_out_steps"] == [23] and found["left_out"]["text_sha1"] == old[23]["text_sha1"]
    assert without_times(new[:23]) == without_times(old[:23])
    # 12 steps behind the 24th, each one earlier.
    assert len(new) == 35 == found["steps"]
    assert [row["text_sha1"] for row in new] == [row["text_sha1"] for row in old[:36] if row["step"] != 23]
    assert new[23]["skipped"] == {"left out": 1}
    for row, document in zip(new[23:], found["documents"], strict=True):
        assert (document["step"], document["step_without"]) == (row["step"] + 1, row["step"])
        assert document["loss"] == old[row["step"] + 1]["loss"] and document["loss_without"] == row["loss"]
        assert document["difference"] == row["loss"] - old[row["step"] + 1]["loss"]
        # The schedule goes by the step.
        assert row["learning_rate"] == old[row["step"]]["learning_rate"]
    differences = [document["difference"] for document in found["documents"]]
    assert all(differences) and found["summary"]["changed"] == 12
    assert found["summary"]["mean"] == pytest.approx(sum(differences) / 12)
    assert found["summary"]["greatest"] == max(differences)
    assert sum(each["documents"] for each in found["by_domain"].values()) == 12
    assert found["after"]["1"]["mean"] == differences[0] and found["after"].keys() == {"1", "10"}


@pytest.mark.slow
def test_a_rewound_run_is_a_run_that_goes_on_without_the_document(finished, without, tmp_path):
    folder = Path(shutil.copytree(without[1], tmp_path / "run"))
    assert checks.verify(folder).ok, checks.verify(folder).lines
    assert yaml_file.read_config(str(folder / "run_config.yaml"))["leave_out"] == ["example_train_0.jsonl.zst#23"]
    # As if it had been killed and lost its last checkpoint: it goes on from where it was begun.
    shutil.rmtree(folder / "checkpoint-35")
    shutil.rmtree(folder / "checkpoint-30")
    rows = read_ledger(folder)
    done = run_script("--output_dir", str(folder), "--resume_from_checkpoint", "true")
    assert done.returncode == 0, done.stderr
    assert without_times(read_ledger(folder)) == without_times(rows)
    with pytest.raises(UserError, match="begun otherwise: --leave_out"):
        command_line.parse(
            [
                "--output_dir",
                str(folder),
                "--resume_from_checkpoint",
                "true",
                "--leave_out",
                "example_train_0.jsonl.zst#24",
            ]
        )


@pytest.mark.slow
def test_the_losses_are_those_of_a_corpus_without_it(finished, shards, tmp_path):
    """From the very start: the same as training on files from which the record was taken out."""
    record = make_records(30, seed=1)
    write_records(tmp_path / "less" / "example_train_0.jsonl.zst", record[:3] + record[4:])
    done = run_script(
        *NANO, "--dataset", str(tmp_path / "less" / "example_train_0.jsonl.zst"), "--max_steps", "9", "--warmup_steps", "20",
        "--precision", "float32", "--no-checkpoint", "--display_samples", "99", "--output_dir", str(tmp_path / "run-less"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = rewind.rewind(finished, 0, 3, steps=6, output_dir=str(tmp_path / "without"))
    assert found.ok and found.start == 0 and found.repeated == 3
    assert "the run was in warm-up" in " ".join(found.notes)
    rows, expected = read_ledger(tmp_path / "without"), read_ledger(tmp_path / "run-less")
    numbers = ("loss", "accuracy", "grad_norm", "learning_rate", "text_sha1", "tokens")
    assert len(rows) == 9
    assert [[row[name] for name in numbers] for row in rows] == [[row[name] for name in numbers] for row in expected]


def test_a_new_run_goes_beside_the_old_one(tmp_path):
    assert rewind.default_folder(tmp_path / "run", 20, 23) == tmp_path / "run-without-23"
    assert rewind.default_folder(tmp_path / "run", 20, None) == tmp_path / "run-from-20"


# ---- what is to be done ----


@pytest.mark.parametrize(("mode", "gone"), [("truncate", 1), ("window", 3), ("pack", 1)])
def test_what_the_document_of_a_step_is(tmp_path, encoder, shards, mode, gone):
    """Of a document in windows all that are left; of a block of joined documents that block."""
    folder = make_run(tmp_path / "run", f"{shards}/*", encoder, mode, steps=80)
    rows = read_ledger(folder.path)
    counts = {}
    for row in rows:
        counts.setdefault((row["shard"], row["row"]), []).append(row["step"])
    steps = next(steps for steps in counts.values() if len(steps) >= gone and steps[-1] < 60)
    plan = rewind._plan(Run(folder.path), 0, steps[-1], 10)
    expected = steps if mode == "window" else steps[-1:]
    assert plan.left_out_steps == tuple(expected) and plan.end == steps[-1] + 11
    row = rows[steps[-1]]
    assert plan.name == f"{row['shard']}#{row['row']}" + (f".{row['part']}" if mode == "pack" else "")


def test_parts_learned_before_the_checkpoint_are_said_to_stay(tmp_path, encoder, shards, monkeypatch):
    folder = make_run(tmp_path / "run", f"{shards}/*", encoder, "window", steps=80)
    rows = read_ledger(folder.path)
    step = next(row["step"] for row in rows if row["part"] == 2)
    monkeypatch.setattr(replay, "nearest_checkpoint", lambda run, to: (to, []))
    plan = rewind._plan(Run(folder.path), step, step, None)
    assert plan.left_out_steps[0] == step
    assert f"learned before checkpoint-{step} too (step {step - 2}, {step - 1}): that stays" in plan.notes[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "40"], "--to 40: RUN has steps 0 to 39; name one of them"),
        (["--drop", "99"], "--drop 99: RUN has steps 0 to 39; name one of them"),
        (["--to", "25", "--drop", "12"], "--drop 12: learned before checkpoint-20, the nearest to --to 25; name a --to of 12 or less"),
        (["--drop", "39"], "--drop 39: no step of RUN follows it; name an earlier one"),
        ([], "nothing to do; expected --to N (where to begin), --drop STEP (what to leave out)"),
        (["--drop", "3", "--output_dir", "RUN"], "RUN: there is something in it already; name a new folder with --output_dir"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_sentence(finished, words, message):
    words = [word.replace("RUN", str(finished)) for word in words]
    with pytest.raises(UserError) as error:
        __main__.main(["rewind", str(finished), *words])
    assert message.replace("RUN", str(finished)) in str(error.value)


# ---- what is said ----


def test_the_terminal_says_what_was_done_and_what_came_of_it(finished):
    row = read_ledger(finished)[23]
    changes = tuple(
        Change(24 + n, 23 + n, "a.zst", 24 + n, 0, "RedPajamaC4", 9, 5.0, 5.0 + (-1) ** n * n / 100) for n in range(12)
    )
    lost = Change(36, 35, "a.zst", 36, 0, "RedPajamaGithub", 9, None, 4.0)
    found = rewind.Rewound("runs/a", "runs/b", 20, 36, row, (23,), 3, (), (*changes, lost), ("a note",))
    drawn = terminal.console()
    drawn.width = 80
    with drawn.capture() as capture:
        show(drawn, found)
    text = capture.get()
    assert max(map(len, text.split("\n"))) <= 80
    assert "ok      steps 20 to 22 done again: bit-equal" in text
    assert "followed by the same 13 documents, each 1 step earlier" in text
    assert "the 10 that changed most" in text and "note: a note" in text
    assert "+0.10000" in text and "-0.11000" in text
    found = rewind.Rewound("runs/a", "runs/b", 20, 36, None, (), 16, ((22, {"loss": (1.0, 2.0)}),), (), ())
    assert not found.ok and found.to_dict()["repeated_steps_that_differ"][0]["step"] == 22
    with drawn.capture() as capture:
        show(drawn, found)
    assert "FAILED  step 22 is not as it was: loss 1.0 / 2.0" in capture.get()


@pytest.mark.slow
def test_a_ctrl_c_leaves_what_is_done_and_says_where(shards, tmp_path):
    run = tmp_path / "run"
    flags = [*NANO, "--dataset", f"{shards}/*.jsonl.zst", "--save_steps", "20", "--max_steps", "80"]
    assert run_script(*flags, "--output_dir", str(run)).returncode == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "slimpajama_hf", "rewind", str(run), "--to", "0", "--drop", "2", "--output_dir", str(tmp_path / "again")],
        env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    rows = tmp_path / "again" / "ledger.jsonl"
    deadline = time.monotonic() + 120
    while not (rows.exists() and rows.stat().st_size > 3000) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert f"stopped; what is done of it is in {tmp_path / 'again'}" in said and "Traceback" not in said
    done = read_ledger(tmp_path / "again")
    assert 0 < len(done) < 79 and checks.verify(tmp_path / "again").ok
    assert checkpoints.steps(tmp_path / "again") == [len(done)]
