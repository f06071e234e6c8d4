"""Files of a run, damaged in every way that a disk or a stranger knows: no traceback, no hang, nothing silently wrong.

`make test-long` makes a few dozen mutations, `make test-faults` as many as $MUTATIONS says (1,000), seeded.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, environment, make_records, run_command, run_script, write_records
from tests.fork_server import ForkServer
from tests.hub.loopback_model_hub import LoopbackModelHub, Repo

COMMANDS = ("resume", "resume", "verify", "report", "inspect", "evaluate", "compare", "views", "push")
WAYS = ("truncate", "flip", "zeros", "delete", "types", "values", "link", "append", "empty")


@pytest.fixture(scope="module")
def half(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of 40 steps as it was after 30."""
    run = Path(shutil.copytree(finished, tmp_path_factory.mktemp("damage") / "half"))
    shutil.rmtree(run / "checkpoint-40")
    write_records(run.parent / "held-out.jsonl", make_records(4, seed=3))
    return run


def damage(run: Path, path: Path, way: str, draw: random.Random) -> None:
    content = path.read_bytes()
    at = draw.randrange(max(len(content), 1))
    if way == "truncate":
        path.write_bytes(content[:at])
    elif way == "flip":
        changed = bytearray(content or b"\0")
        changed[at] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
    elif way == "zeros":
        path.write_bytes(content[:at] + bytes(min(512, len(content) - at)) + content[at + 512 :])
    elif way == "delete":
        path.unlink()
    elif way == "types":
        path.write_bytes(draw.choice([b"[]", b"3", b'"x"', b"{}", b"null", b"[" * 20_000, b'{"step": "x"}\n', b"NaN"]))
    elif way == "values":
        numbers = list(re.finditer(rb"(?<=[:\[ ])-?\d[\d.e+-]*|\"[^\"]*\"(?=[,}\]])", content)) or [
            re.search(rb"", content)
        ]
        match = draw.choice(numbers)
        new = draw.choice([b"-1", b"null", b'"y"', b"1e999", b"[]", b"{}", b"999999999999999999999", b"true"])
        path.write_bytes(content[: match.start()] + new + content[match.end() :])
    elif way == "link":
        path.unlink()
        path.symlink_to(run.parent / "elsewhere.txt")
    elif way == "append":
        path.write_bytes(content + draw.choice([b"garbage", b"\n\n", b'{"step": 5}\n', content[:200]]))
    else:
        path.write_bytes(b"")


def command(name: str, run: Path, finished: Path) -> subprocess.CompletedProcess[str]:
    if name == "resume":
        return run_script(
            "--output_dir", str(run), "--resume_from_checkpoint", "true", "--max_steps", "40", timeout=120
        )
    words = {
        "inspect": [str(run), "--step", "17"],
        "evaluate": [str(run), "--dataset", str(run.parent / "held-out.jsonl"), "--documents", "2"],
        "compare": [str(run), str(finished), "--output", str(run.parent / "comparison.png")],
        "push": [str(run), "--hub_patience", "1"],
    }.get(name, [str(run)])
    return run_command(name, *words, timeout=120)


def mutate(seed: int, half: Path, finished: Path, place: Path) -> tuple[str, str, str, str]:
    """(what happened, command, way, file) of one mutation; AssertionError for what may not happen."""
    draw = random.Random(seed)
    run = Path(shutil.copytree(half, place / f"run-{seed}"))
    (place / "elsewhere.txt").write_text("not the run's")
    for name in ("held-out.jsonl",):
        shutil.copy(half.parent / name, place)
    files = sorted(path for path in run.rglob("*") if path.is_file() and path.name != "_lock")
    path, way = draw.choice(files), draw.choice(WAYS)
    name = COMMANDS[seed % len(COMMANDS)]
    damage(run, path, way, draw)
    where = f"mutation {seed}: {name} after {way} of {path.relative_to(run)}"
    done = command(name, run, finished)
    said = done.stdout + done.stderr
    assert "Traceback" not in said, f"{where}\n{said[-3000:]}"
    assert done.returncode in (0, 1, 2), f"{where}: exit code {done.returncode}\n{said[-2000:]}"
    assert done.returncode == 0 or "error: " in said or name == "verify", f"{where}\n{said[-2000:]}"
    assert (place / "elsewhere.txt").read_text() == "not the run's", where
    outcome = "went on" if done.returncode == 0 else "refused"
    if name == "resume" and done.returncode == 0:
        weights = [(folder / "checkpoint-40" / "model.safetensors").read_bytes() for folder in (run, finished)]
        assert weights[0] == weights[1], f"{where}: other weights\n{said[-2000:]}"
        for file in ("ledger.jsonl", "samples.jsonl", "passports.jsonl", "prompts.jsonl"):
            for line in (run / file).read_text().splitlines():
                json.loads(line)
        after = run_command("verify", str(run))
        older = path.relative_to(run).parts[0] in ("checkpoint-10", "checkpoint-20")
        failed = re.findall(r"^FAILED +(.+?)  ", after.stdout, re.M)
        if path.name == "samples.jsonl" and failed:
            # A sample of an earlier step cannot be made again: the resume and `verify` both name the file or its entry.
            assert failed == ["sample accuracy"] and "samples.jsonl" in said, f"{where}\n{after.stdout}{said[-2000:]}"
            older = True
        # A damaged older checkpoint is no reason not to go on, and is named.
        assert after.returncode == (1 if older else 0), (
            f"{where}: it does not verify\n{after.stdout[-2000:]}{said[-2000:]}"
        )
    shutil.rmtree(run)
    return outcome, name, way, path.name


# ---- a pushed repository ----


class Pushed:
    """The half of a run on a Hub, and a program that fetches it in one state or another."""

    def __init__(self, half: Path, shards: Path, server: LoopbackModelHub) -> None:
        self.server, self._shards = server, shards
        self.variables = environment(**server.environment())
        self.programs = ForkServer(self.variables)
        done = self.programs.run(
            ["-m", "slimpajama_hf", "push", str(half), "--hub_model_id", "me/run"], self.variables, ROOT, 120
        )
        assert done.returncode == 0, done.stderr

    def go_on(
        self, seed: int, place: Path, finished: Path, damaged: str | None = None, way: str | None = None
    ) -> tuple[str, str]:
        """Fetch the repository with one file of it damaged, and go on; (what happened, file)."""
        draw = random.Random(f"pushed {seed}")
        place.mkdir()
        repository = place / "repository"
        for name, content in self.server.models["me/run"].files.items():
            (repository / name).parent.mkdir(parents=True, exist_ok=True)
            (repository / name).write_bytes(content)
        drawn = draw.choice(sorted(path for path in repository.rglob("*") if path.is_file()))
        path = repository / damaged if damaged else drawn
        way = way or draw.choice([way for way in WAYS if way != "link"])
        damage(repository, path, way, draw)
        files = {p.relative_to(repository).as_posix(): p.read_bytes() for p in repository.rglob("*") if p.is_file()}
        self.server.models[f"me/damaged-{seed}"] = Repo(private=False)
        self.server.models[f"me/damaged-{seed}"].commit("Step 30", files)
        run, where = place / "run", f"{way} of {path.relative_to(repository)} in a repository ({seed})"
        words = [str(ROOT / "run_clm_slimpajama.py"), "--resume_from_checkpoint", f"me/damaged-{seed}", "--output_dir",
                 str(run), "--max_steps", "40", "--dataset", f"{self._shards}/*.jsonl.zst"]  # fmt: skip
        done = self.programs.run(words, self.variables | {"HF_HOME": str(place / "hf")}, ROOT, 120)
        said = done.stdout + done.stderr
        assert "Traceback" not in said, f"{where}\n{said[-3000:]}"
        assert done.returncode == 0 or (done.returncode in (1, 2) and "error: " in said), f"{where}\n{said[-2000:]}"
        if done.returncode:
            return "refused", path.name
        weights = [(folder / "checkpoint-40" / "model.safetensors").read_bytes() for folder in (run, finished)]
        assert weights[0] == weights[1], f"{where}: other weights\n{said[-2000:]}"
        after = run_command("verify", str(run))
        assert after.returncode == 0, f"{where}: it does not verify\n{after.stdout[-2000:]}{said[-2000:]}"
        return "went on", path.name


@pytest.fixture(scope="module")
def pushed(half: Path, shards: Path) -> Iterator[Pushed]:
    with LoopbackModelHub() as server:
        pushed = Pushed(half, shards, server)
        yield pushed
        pushed.programs.close()


@pytest.mark.long
def test_damaged_repositories(pushed, finished, tmp_path):
    for seed in range(2):
        pushed.go_on(seed, tmp_path / str(seed), finished)
    # Nothing vouches for the bytes of these two: the one is settled on this machine, the other is its flags.
    for seed, name in enumerate(("run.json", "run_config.yaml"), 50):
        assert pushed.go_on(seed, tmp_path / str(seed), finished, name, "zeros") == ("refused", name)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_damaged_repositories(pushed, finished, tmp_path, fault_table):
    failures, outcomes = [], Counter()
    for seed in range(100, 100 + int(os.environ.get("REPOSITORIES", "100"))):
        try:
            outcomes[pushed.go_on(seed, tmp_path / str(seed), finished)[0]] += 1
        except (AssertionError, subprocess.TimeoutExpired) as error:
            failures.append(str(error))
        shutil.rmtree(tmp_path / str(seed), ignore_errors=True)
    for outcome, count in sorted(outcomes.items()):
        fault_table(f"a file of a pushed repository damaged, then fetched: {outcome}", count, bit_equal=True)
    assert not failures, f"{len(failures)} of them:\n" + "\n\n".join(failures)


# ---- a folder ----


@pytest.mark.first(1)
@pytest.mark.parametrize("part", range(4))
@pytest.mark.long
def test_some_mutations(part, half, finished, tmp_path):
    failures = []
    for seed in range(part, 20, 4):
        try:
            mutate(seed, half, finished, tmp_path)
        except AssertionError as error:
            failures.append(str(error))
    assert not failures, "\n\n".join(failures)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("part", range(4))
def test_a_thousand_mutations(part, half, finished, tmp_path, fault_table: Callable[..., None]):
    failures, outcomes = [], Counter()
    for seed in range(1000 + part, 1000 + int(os.environ.get("MUTATIONS", "1000")), 4):
        try:
            outcome, name, *_ = mutate(seed, half, finished, tmp_path)
            outcomes[name, outcome] += 1
        except (AssertionError, subprocess.TimeoutExpired) as error:
            failures.append(str(error))
            shutil.rmtree(tmp_path / f"run-{seed}", ignore_errors=True)
    for (name, outcome), count in sorted(outcomes.items()):
        fault_table(f"a file damaged, then {name}: {outcome}", count, bit_equal=True if name == "resume" else None)
    assert not failures, f"{len(failures)} of them:\n" + "\n\n".join(failures)


DEEP = b"[" * 20_000


@pytest.mark.parametrize(
    "name, words, content, says",
    [
        ("checkpoint-30/data_state.json", ["verify"], DEEP, "checkpoint-30: no cursor can be read in data_state.json"),
        ("_outbox/pushed.json", ["push"], b'"x"', "there is no Hub token"),
        ("_outbox/pushed.json", ["push"], DEEP, "there is no Hub token"),
    ],
)
def test_json_of_another_kind_is_a_sentence(half, tmp_path, name, words, content, says):
    run = Path(shutil.copytree(half, tmp_path / "run"))
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_bytes(content)
    done = run_command(*words, str(run))
    assert done.returncode in (1, 2) and says in done.stdout + done.stderr, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_line_that_is_no_sample_is_left_out_and_said(half, tmp_path):
    run = Path(shutil.copytree(half, tmp_path / "run"))
    with open(run / "samples.jsonl", "a") as file:
        file.write('{"step": 5}\n[1]\n')
    done = run_command("views", str(run))
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "samples.jsonl: 2 lines are no entries of it and are left out" in done.stderr
