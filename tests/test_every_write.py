"""The disk fails, or the process is killed, at any change to a file that a command makes: at each one in turn.

A shim (`disk_faults.c`) that is loaded before the C library counts the changes of a command to the files of a run, and
makes the K-th fail: no space, over quota, a broken disk, a kill -9. `make test-long` takes a few K of each
command, `make test-faults` as many as $WRITES says.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from slimpajama_hf.record import checkpoints, evaluations
from tests.conftest import NANO, ROOT, environment, make_records, run_command, run_script, write_records
from tests.fork_server import ForkServer
from tests.hub.loopback_model_hub import LoopbackModelHub
from tests.test_interruptions import assert_bit_equal

STEPS = 12

#: What happens at the change: an error number (one change, or every one from there on), or a kill.
WAYS = {
    "ENOSPC, once": (errno.ENOSPC, False),
    "ENOSPC from there on": (errno.ENOSPC, True),
    "EDQUOT from there on": (errno.EDQUOT, True),
    "EIO, once": (errno.EIO, False),
    "EIO from there on": (errno.EIO, True),
    "kill -9": (0, False),
}
COMMANDS = ("train", "resume", "report", "views", "search", "rewind", "push")


class FailingDisk:
    """Runs commands whose K-th change to a file under a folder fails."""

    def __init__(self, place: Path, variables: dict[str, str]) -> None:
        shim = place / "disk_faults.so"
        subprocess.run(
            ["gcc", "-O1", "-shared", "-fPIC", "-o", str(shim), str(ROOT / "tests/disk_faults.c"), "-ldl"], check=True
        )
        self.variables = environment(LD_PRELOAD=str(shim), **variables)
        self.server = ForkServer(self.variables)
        self.counter, self.log = place / "count", place / "faults.txt"

    def run(
        self, arguments: list[str], under: Path, first: int | None = None, last: int | None = None, how: int = 0
    ) -> tuple[subprocess.CompletedProcess[str], int, list[str]]:
        """(what came of it, how many changes there were, the faults that it met)."""
        self.counter.write_bytes(bytes(8))
        self.log.unlink(missing_ok=True)
        faults = {"FAULT_UNDER": str(under), "FAULT_COUNT": str(self.counter), "FAULT_LOG": str(self.log)}
        if first is not None:
            faults |= {"FAULT_FIRST": str(first), "FAULT_LAST": str(last), "FAULT_HOW": str(how)}
        done = self.server.run(arguments, self.variables | faults, ROOT, 200)
        met = self.log.read_text().splitlines() if self.log.exists() else []
        return done, int.from_bytes(self.counter.read_bytes(), "little"), met


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FailingDisk]:
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to make the shim with")
    with LoopbackModelHub() as hub:
        disk = FailingDisk(tmp_path_factory.mktemp("shim"), hub.environment())
        yield disk
        disk.server.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, held-out text, and two runs over it: `unbroken`, and `half` of it."""
    place = tmp_path_factory.mktemp("writes")
    write_records(place / "corpus/a.jsonl.zst", make_records(30, seed=400))
    write_records(place / "held-out.jsonl", make_records(3, seed=401))
    done = run_script(*flags_of(place, place / "unbroken"))
    assert done.returncode == 0, done.stderr
    shutil.copytree(place / "unbroken", place / "half")
    shutil.rmtree(place / "half/checkpoint-12")
    return place


def flags_of(place: Path, run: Path, resume: bool = False) -> list[str]:
    return [*NANO, "--dataset", f"{place}/corpus/*.jsonl.zst", "--max_steps", str(STEPS), "--output_dir", str(run),
            "--display_samples", "3", "--viz_interval", "6", "--warmup_steps", "5", "--save_steps", "4",
            "--save_total_limit", "2", "--precision", "float32", "--eval_dataset", str(place / "held-out.jsonl"),
            "--eval_steps", "4", "--eval_strategy", "steps",
            *(["--resume_from_checkpoint", "true"] if resume else [])]  # fmt: skip


def arguments_of(command: str, place: Path, run: Path) -> list[str]:
    if command in ("train", "resume"):
        return [str(ROOT / "run_clm_slimpajama.py"), *flags_of(place, run, resume=command == "resume")]
    words = {
        "search": ["inspect", str(run), "--find", "river"],
        "rewind": ["rewind", str(run), "--to", "8", "--output_dir", str(run / "rewound")],
        "push": ["push", str(run), "--hub_model_id", "me/run", "--hub_patience", "1"],
    }.get(command, [command, str(run)])
    return ["-m", "slimpajama_hf", *words]


def recorded(run: Path) -> dict[str, bytes]:
    """What no command but training may touch."""
    names = ("ledger.jsonl", "surprisals.f32", "samples.jsonl", "passports.jsonl", "run.json", "run_config.yaml")
    paths = [run / name for name in names] + [p for p in run.glob("checkpoint-*/**/*") if p.is_file()]
    return {str(path.relative_to(run)): path.read_bytes() for path in paths}


def break_once(disk: FailingDisk, place: Path, at: Path, command: str, way: str, draw: random.Random) -> str | None:
    """One command with one fault at a change that is drawn; what the fault met. AssertionError for what may not be."""
    number, persists = WAYS[way]
    run = at / "run"
    shutil.rmtree(run, ignore_errors=True)
    if command != "train":
        shutil.copytree(place / ("half" if command == "resume" else "unbroken"), run)
    before = None if command in ("train", "resume") else recorded(run)
    arguments = arguments_of(command, place, run)
    first = draw.randrange(1, CHANGES[command] + 1)
    done, _, met = disk.run(arguments, run, first, 2**60 if persists else first, number)
    said = done.stdout + done.stderr
    where = f"{command}, {way} at change {first} ({met[0] if met else 'not met'})"
    assert "Traceback" not in said, f"{where}\n{said[-3000:]}"
    if number:
        assert done.returncode in (0, 1), f"{where}: exit code {done.returncode}\n{said[-2000:]}"
        assert done.returncode == 0 or "error: " in said, f"{where}\n{said[-2000:]}"
    if before is not None:
        assert recorded(run) == before, where
    elif done.returncode == 0:
        _assert_whole(run, place, f"{where}: exit code 0\n{said[-2000:]}")
    # And then on a disk that works: the same command goes on, or does it again.
    shutil.rmtree(run / "rewound", ignore_errors=True)
    again = arguments_of("resume", place, run) if command == "train" else arguments
    done, _, _ = disk.run(again, run)
    said = done.stdout + done.stderr
    assert done.returncode == 0, f"after {where}\n{said[-3000:]}"
    if before is None:
        _assert_whole(run, place, f"after {where}\n{said[-2000:]}")
    else:
        assert recorded(run) == before, f"after {where}"
    return met[0] if met else None


#: Changes of each command to files under the run's folder, counted when it is first run.
CHANGES: dict[str, int] = {}


def count_changes(disk: FailingDisk, place: Path, at: Path, command: str) -> None:
    if command not in CHANGES:
        run = at / "run"
        if command != "train":
            shutil.copytree(place / ("half" if command == "resume" else "unbroken"), run)
        done, CHANGES[command], _ = disk.run(arguments_of(command, place, run), run)
        assert done.returncode == 0, done.stderr
        assert CHANGES[command] > 1, f"{command} changes nothing: the shim does not see it"


def _assert_whole(run: Path, place: Path, where: str) -> None:
    verified = run_command("verify", str(run))
    assert verified.returncode == 0, f"{where}\n{verified.stdout}"
    try:
        # One that was saved at the second try was saved after the Trainer noted its times and its operations.
        states = [folder / f"checkpoint-{STEPS}/trainer_state.json" for folder in (run, place / "unbroken")]
        left, right = (json.loads(state.read_text()) for state in states)
        assert all(left[name] == right[name] for name in ("global_step", "max_steps", "epoch"))
        shutil.copyfile(states[1], states[0])
        assert_bit_equal(run, place / "unbroken", STEPS)
        for name in ("samples.jsonl", "evaluations.jsonl"):
            entries = [
                [json.loads(line) | {"seconds": 0} for line in (folder / name).read_text().splitlines()]
                for folder in (run, place / "unbroken")
            ]
            assert entries[0] == entries[1], name
    except (AssertionError, OSError) as error:
        raise AssertionError(f"{where}\n{error}") from None


# The others, and more faults of these, in the long version.
@pytest.mark.parametrize("command", ["train", pytest.param("rewind", marks=pytest.mark.slow)])
@pytest.mark.long
def test_a_fault_at_a_write_is_a_sentence_and_nothing_is_lost(disk, place, tmp_path, command):
    count_changes(disk, place, tmp_path, command)
    draw = random.Random(command)
    for way in ("ENOSPC from there on", "kill -9"):
        break_once(disk, place, tmp_path, command, way, draw)


@pytest.mark.long
def test_a_checkpoint_is_removed_whole_or_not_at_all(disk, place, tmp_path):
    """Where a removal fails, that is said; no half of a checkpoint is left under its name."""
    script, run = tmp_path / "remove.py", tmp_path / "run"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom slimpajama_hf.record import checkpoints\n"
        "checkpoints.keep_newest(Path(sys.argv[1]), 1)\n"
    )
    for first in (1, 2, 3, 9):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(place / "unbroken", run)
        done, _, met = disk.run([str(script), str(run)], run, first, first, errno.EIO)
        assert met and "cannot be removed (Input/output error); the next save tries again" in done.stderr, done.stderr
        assert [checkpoints.problem(checkpoints.path_of(run, step)) for step in checkpoints.steps(run)] == [
            None for _ in checkpoints.steps(run)
        ]
        done, _, _ = disk.run([str(script), str(run)], run)
        assert not done.stderr and not list(run.glob("_removing*")) and checkpoints.steps(run) == [STEPS]


@pytest.mark.long
@pytest.mark.parametrize("until", [8, STEPS])
def test_scores_that_the_disk_does_not_take_are_said_and_kept_for_later(place, tmp_path, until):
    """A run whose scores cannot be written until step `until`: they are written later, or the end of the run is an
    error."""
    script, run = tmp_path / "train.py", tmp_path / "run"
    source = (ROOT / "run_clm_slimpajama.py").read_text()
    call = "        return run.train(trainer)\n"
    assert source.count(call) == 1
    script.write_text(source.replace(call, f"        trainer.add_callback(FullUntil(trainer))\n{call}").replace(
        "def main(", "from pathlib import Path\nfrom transformers import TrainerCallback\n\n\n"
        "class FullUntil(TrainerCallback):\n"
        "    def __init__(self, trainer):\n"
        "        self.file = trainer.held_out.file\n"
        "        self.place, self.file.path = self.file.path, Path('/dev/full')\n\n"
        "    def on_step_begin(self, args, state, control, **kwargs):\n"
        f"        if state.global_step == {until}:\n"
        "            self.file.path = self.place\n\n\n"
        "def main("))  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(script), *flags_of(place, run)], env=environment(PYTHONPATH=str(ROOT)), cwd=tmp_path,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "not saved: the scores of step 4 (No space left on device); the next ones try again" in done.stderr
    written = [entry["step"] for entry in evaluations.read(run / "evaluations.jsonl")]
    if until == STEPS:
        assert done.returncode == 1 and written == [], done.stderr
        assert "error: the end of the run is not saved (No space left on device)" in done.stderr
    else:
        assert done.returncode == 0 and written == [4, 8, 12], done.stderr


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("command", COMMANDS)
def test_faults_at_many_writes(disk, place, tmp_path, command, fault_table):
    count_changes(disk, place, tmp_path, command)
    failures, met = [], Counter()
    for way in WAYS:
        draw = random.Random(f"{command} {way}")
        for _ in range(int(os.environ.get("WRITES", "20"))):
            try:
                if break_once(disk, place, tmp_path, command, way, draw) is not None:
                    met[way] += 1
            except (AssertionError, subprocess.TimeoutExpired) as error:
                failures.append(str(error))
    for way, count in met.items():
        fault_table(f"{way}, at a write of {command} (of {CHANGES[command]})", count, bit_equal=True)
    assert not failures, f"{len(failures)} of them:\n" + "\n\n".join(failures)
