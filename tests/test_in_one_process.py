"""`main()` called from a program or a notebook: several runs in one process, and one in a thread."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from slimpajama_hf.errors import UserError
from slimpajama_hf.record import checkpoints, run_folder
from tests.conftest import NANO, ROOT, environment, read_ledger, run_script, write_records

SMALL = [*NANO, "--max_seq_length", "32", "--viz_interval", "1000", "--display_samples", "1000"]

PROGRAM = """
import json, sys, threading
import run_clm_slimpajama
from slimpajama_hf.errors import UserError

def call(flags):
    try:
        return run_clm_slimpajama.main(flags)
    except UserError as error:
        return str(error)

for where, flags in json.loads(sys.argv[1]):
    answers = []
    if where == "thread":
        thread = threading.Thread(target=lambda: answers.append(call(flags)))
        thread.start()
        thread.join()
    else:
        answers.append(call(flags))
    print(json.dumps(answers))
"""


def calls(*each: tuple[str, list[str]]) -> tuple[list[int | str], str]:
    """What `main` returned or said at each call, all in one process; and its stderr."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(each)],
        capture_output=True, text=True, timeout=280, cwd=ROOT, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(len(answer) == 1 for answer in answers), done.stderr
    return [answer[0] for answer in answers], done.stderr


@pytest.mark.long
def test_runs_one_after_the_other_in_one_process_and_in_a_thread(shards, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    base = [*SMALL, "--dataset", f"{shards}/*.jsonl.zst"]
    on = [*base, "--output_dir", str(first)]
    refused = [*on, "--resume_from_checkpoint", "true", "--learning_rate", "0.5"]
    answers, said = calls(
        ("here", [*on, "--max_steps", "3"]),
        # The same folder again: gone on with, refused, gone on with.
        ("here", [*on, "--max_steps", "5", "--resume_from_checkpoint", "true"]),
        ("here", [*on, "--max_steps", "5"]),
        ("here", [*refused, "--max_steps", "7"]),
        ("here", [*on, "--max_steps", "6", "--resume_from_checkpoint", "true"]),
        # Another folder and another precision; then in a thread, over the first.
        ("here", [*base, "--output_dir", str(second), "--max_steps", "2", "--backward", "autograd"]),
        ("thread", [*on, "--max_steps", "2", "--seed", "7", "--overwrite_output_dir"]),
        ("thread", [*on, "--max_steps", "4", "--seed", "7", "--resume_from_checkpoint", "true"]),
    )  # fmt: skip
    assert [answer if isinstance(answer, int) else "refused" for answer in answers] == [
        0, 0, "refused", "refused", 0, 0, 0, 0,
    ], (answers, said)  # fmt: skip
    assert "holds a run already" in str(answers[2]) and "--learning_rate 0.5" in str(answers[3])
    assert [row["step"] for row in read_ledger(first)] == [0, 1, 2, 3]
    assert checkpoints.steps(first) == [2, 4] and checkpoints.steps(second) == [2]
    assert not any(path.stat().st_size for path in tmp_path.glob("*/_lock")) and not list(tmp_path.glob("*/_replac*"))
    # Where a signal cannot be caught, that is said, and only there.
    assert said.count("Ctrl-C and SIGTERM are not caught") == 2, said


def content(run: Path) -> dict[str, bytes]:
    """Every file of a run and what is in it."""
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.fixture
def run(finished, tmp_path) -> Path:
    import shutil

    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.mark.long
def test_a_run_is_not_deleted_by_one_that_makes_no_step(run, tmp_path):
    """Everything is there, corpus, model and Trainer, but no document that could be learned."""
    write_records(tmp_path / "empty.jsonl", [{"text": "a"}, {"text": ""}])
    before = content(run)
    done = run_script(*SMALL, "--dataset", str(tmp_path / "empty.jsonl"), "--output_dir", str(run),
                      "--overwrite_output_dir", "--max_steps", "5")  # fmt: skip
    assert done.returncode == 1 and "no document to learn from" in done.stderr, done.stderr
    assert "the run that was to be replaced is back; the new one did not make a step" in done.stderr
    assert content(run) == before


@pytest.mark.first(6)
@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("killed", ["half aside", "aside", "new run begun", "half back", "half deleted"])
def test_a_start_that_was_killed_while_it_replaced_a_run(run, killed, overwrite, capfd):
    """The next start finds the old run whole, as long as the new one had made no step."""
    before = content(run)
    folder = run_folder.RunFolder(run)
    run_folder.put_aside(folder)
    if killed in ("half aside", "half back"):
        (run / "_replaced").rename(run / "_moving")
        for name in ("ledger.jsonl", "run.json", "checkpoint-10"):
            (run / "_moving" / name).rename(run / name)
    elif killed in ("new run begun", "half deleted"):
        folder.record.write_bytes(before["run.json"])
        folder.ledger.write_text('{"step": 0}\n' if killed == "half deleted" else '{"step": 0')
    if not overwrite and killed != "half deleted":
        # What came back is no run to be replaced unasked.
        with ExitStack() as at_end, pytest.raises(UserError, match="holds a run already"):
            run_folder.prepare(str(run), at_end, False, False)
    with ExitStack() as at_end:
        run_folder.prepare(str(run), at_end, not overwrite, overwrite)
    if killed == "half deleted":
        assert sorted(content(run)) == ["_lock", "ledger.jsonl", "run.json"]
    else:
        assert content(run) == before
        assert "is back" in capfd.readouterr().err
    assert not [path.name for path in run.iterdir() if path.name.startswith("_replac")]


@pytest.mark.slow
def test_a_full_disk_counts_what_the_replaced_run_frees(run, monkeypatch):
    folder = run_folder.RunFolder(run)
    held = sum(map(len, content(run).values()))
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 0}))
    with pytest.raises(UserError, match="make room"):
        run_folder.refuse_full_disk(folder, held // 2)
    run_folder.put_aside(folder)
    run_folder.refuse_full_disk(folder, held // 2)
