"""`python -m slimpajama_hf verify`: damage to a real run is found and named, its steps are done again, runs compared."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slimpajama_hf.errors import UsageError, UserError
from slimpajama_hf.lookback import checkpoint_checks, checks, replay, run, side_by_side
from slimpajama_hf.record import ledger
from tests.conftest import NANO, ROOT, environment, read_ledger, run_command, run_script


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The finished run, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def findings(run: Path) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in checks.verify(run).data["checks"]}


def change_lines(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    path.write_text("".join(change(path.read_text(encoding="utf-8").splitlines(keepends=True))), encoding="utf-8")


def change_json(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def flip_a_digit_of_the_loss(run: Path, step: int) -> None:
    """The last digit of a loss becomes another; the rest of the line stays."""

    def other_digit(match: re.Match[str]) -> str:
        return match[1] + str((int(match[2]) + 1) % 9 + 1)

    def change(lines: list[str]) -> list[str]:
        before = lines[step]
        lines[step] = re.sub(r'("loss":[\d.]*)(\d)', other_digit, before, count=1)
        assert lines[step] != before
        return lines

    change_lines(run / "ledger.jsonl", change)


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# ---- verify RUN ----


def test_all_of_a_whole_run_holds(finished):
    done = run_command("verify", str(finished))
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, last = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["ok"] * len(checks.CHECKS) + ["note"] * len(checks.NOT_COVERED)
    assert read_ledger(finished)[-1]["chain"] in done.stdout
    assert "4 agree with the ledger" in done.stdout and "40 of 40 steps" in done.stdout
    assert last == f"{finished}: all of it holds"


def test_a_damaged_run_exits_with_1_and_json_says_where(copy):
    flip_a_digit_of_the_loss(copy, 15)
    done = run_command("verify", str(copy), "--json")
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] is False
    failed = {check["name"]: check["words"] for check in report["checks"] if not check["ok"]}
    assert failed.keys() == {"ledger", "code bits", "metrics history"}
    assert all(words.startswith("step 15: ") for words in failed.values())


def _drop(step: int) -> Callable[[Path], None]:
    return lambda run: change_lines(run / "ledger.jsonl", lambda lines: lines[:step] + lines[step + 1 :])


def _tear(run: Path) -> None:
    path = run / "ledger.jsonl"
    path.write_bytes(path.read_bytes()[:-30])


def _set_accuracy(run: Path) -> None:
    """A row rewritten with a hash of its own that is right: only the row after it gives it away."""
    rows = read_ledger(run)
    rows[7]["accuracy"] = 0.5
    rows[7]["chain"] = ledger.chain_hash(rows[6]["chain"], rows[7])
    (run / "ledger.jsonl").write_text("".join(ledger.encode(row) + "\n" for row in rows), encoding="utf-8")


def _rewrite_from_25(run: Path) -> None:
    """Everything from step 25 on rewritten, all hashes right: only the checkpoints know better."""
    rows = read_ledger(run)
    rows[25]["text_sha1"] = "0" * 40
    for before, row in itertools.pairwise(rows):
        row["chain"] = ledger.chain_hash(before["chain"], row)
    (run / "ledger.jsonl").write_text("".join(ledger.encode(row) + "\n" for row in rows), encoding="utf-8")


def _other_run_id(run: Path) -> None:
    change_json(run / "run.json", lambda record: record.update(run_id="f" * 32))


def _wrong_cursor(run: Path) -> None:
    change_json(run / "checkpoint-20/data_state.json", lambda state: state["cursor"].update(row=3))


def _change_history(run: Path) -> None:
    change_json(run / "training_viz/metrics_history.json", lambda history: history["loss"].__setitem__(3, 1.25))


def _longer_history(run: Path) -> None:
    def change(history: dict[str, list[Any]]) -> None:
        for values in history.values():
            values.append(1)

    change_json(run / "training_viz/metrics_history.json", change)


def _change_shown_sample(run: Path) -> None:
    change_json(run / "training_viz/text_samples.json", lambda samples: samples[2].update(output="the targets"))


def _change_sample_accuracy(run: Path) -> None:
    change_lines(
        run / "samples.jsonl", lambda lines: [re.sub(r'"accuracy": [\d.]+', '"accuracy": 0.75', line) for line in lines]
    )


#: What is done to the run, the check that finds it, and the words that it finds.
DAMAGE: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "a digit of a loss": (lambda run: flip_a_digit_of_the_loss(run, 15), "ledger", "step 15: a value was changed"),
    "a digit, by its code length": (lambda run: flip_a_digit_of_the_loss(run, 15), "code bits", "step 15: code_bits"),
    "a row rewritten": (_set_accuracy, "ledger", "step 8: a value was changed"),
    "a row gone": (_drop(17), "ledger", "step 17: the row of step 17 is missing (step 18 stands there)"),
    "a row twice": (
        lambda run: change_lines(run / "ledger.jsonl", lambda lines: [*lines[:13], *lines[12:]]),
        "ledger", "step 12: it comes again after step 12",
    ),
    "the last line torn": (_tear, "ledger", "step 39: a torn line"),
    "a line of something else": (
        lambda run: change_lines(run / "ledger.jsonl", lambda lines: [*lines[:5], "[1, 2]\n", *lines[6:]]),
        "ledger", "step 5: not a JSON object",
    ),
    "NaN in a line": (
        lambda run: change_lines(run / "ledger.jsonl", lambda lines: [re.sub(r'"loss":[\d.]+', '"loss":NaN', line) for line in lines]),
        "ledger", "step 0: not strict JSON (NaN); and 39 more",
    ),
    "a word for a number": (
        lambda run: change_lines(run / "ledger.jsonl", lambda lines: [re.sub(r'"loss":[\d.]+', '"loss":"low"', line) for line in lines]),
        "code bits", "step 0: cannot be read",
    ),
    "no ledger": (lambda run: (run / "ledger.jsonl").unlink(), "ledger", "no rows"),
    "the end rewritten with its hashes": (_rewrite_from_25, "checkpoint chain", "checkpoint-30: taken of another ledger"),
    "a shorter ledger": (
        lambda run: change_lines(run / "ledger.jsonl", lambda lines: lines[:33]),
        "checkpoint chain", "checkpoint-40: the ledger ends before it, at step 32",
    ),
    "a byte of the weights": (
        lambda run: flip_a_byte(run / "checkpoint-30/model.safetensors"),
        "checkpoint files", "checkpoint-30: model.safetensors is not what was saved",
    ),
    "a manifest of something else": (
        lambda run: (run / "checkpoint-10/manifest.json").write_text("[]"),
        "checkpoint files", "checkpoint-10: its manifest is not one of ours",
    ),
    "another run's record": (_other_run_id, "checkpoint identity", "checkpoint-10: of another run"),
    "a cursor": (_wrong_cursor, "checkpoint cursor", "checkpoint-20: goes on at example_train_0.jsonl.zst row 3"),
    "a metric": (_change_history, "metrics history", "step 3: loss is 1.25, the ledger has"),
    "a longer view": (_longer_history, "metrics history", "metrics_history.json shows 41 steps, the ledger has 40"),
    "a torn view": (
        lambda run: (run / "training_viz/metrics_history.json").write_text('{"steps": [0,'),
        "metrics history", "cannot be read",
    ),
    "a shown sample": (_change_shown_sample, "text samples", "step 20: output not as in samples.jsonl"),
    "a sample's accuracy": (_change_sample_accuracy, "sample accuracy", "step 0: accuracy 0.75, the row has"),
    "surprisals of another model": (
        lambda run: (run / "surprisals.f32").write_bytes(bytes((run / "surprisals.f32").stat().st_size)),
        "surprisals", "step 0: loss 8.",
    ),
    "surprisals cut short": (
        lambda run: (run / "surprisals.f32").write_bytes((run / "surprisals.f32").read_bytes()[:-4]),
        "surprisals", "step 39: surprisals.f32 ends before it",
    ),
    "a chart": (
        lambda run: flip_a_byte(run / "training_viz/training_latest.png"),
        "latest chart", "training_latest.png is not training_step_000040.png",
    ),
    # What checkpoints have sums of.
    "a byte of the passports": (
        lambda run: flip_a_byte(run / "passports.jsonl"),
        "growing files", "passports.jsonl: not as it was when checkpoint-40 was saved",
    ),
    "a byte of what fixed prompts led to": (
        lambda run: flip_a_byte(run / "prompts.jsonl"), "growing files", "prompts.jsonl: not as it was",
    ),
    "no samples": (lambda run: (run / "samples.jsonl").unlink(), "growing files", "samples.jsonl: not as it was"),
    "a rate in the configuration": (
        lambda run: (run / "run_config.yaml").write_text((run / "run_config.yaml").read_text().replace("warmup_steps: 20", "warmup_steps: 19")),
        "configuration", "run_config.yaml: not the configuration that run.json has the sum of",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_named(copy, damage):
    do, check, words = DAMAGE[damage]
    do(copy)
    found = findings(copy)[check]
    assert not found["ok"]
    assert words in found["words"]


def test_one_damage_is_told_once(copy):
    """The rows behind a gap or a changed value are not accused with it."""
    for damage in ("a digit of a loss", "a row gone", "a row twice", "the last line torn", "a line of something else"):
        run = copy.parent / damage
        shutil.copytree(copy, run)
        DAMAGE[damage][0](run)
        assert len(findings(run)["ledger"]["problems"]) == 1, damage


def test_a_killed_run_with_older_views_and_one_more_sample_holds(copy):
    """Rows 0 to 29 are there, the charts are of step 20, a sample of step 30 was taken and its row was not written."""
    change_lines(copy / "ledger.jsonl", lambda lines: lines[:30])
    shutil.rmtree(copy / "checkpoint-40")
    viz = copy / "training_viz"
    change_json(viz / "metrics_history.json", lambda history: history.update({k: v[:20] for k, v in history.items()}))
    change_json(viz / "text_samples.json", lambda samples: samples.__delitem__(slice(2, None)))
    # A chart of a step that the resume does again stays until it is drawn again.
    shutil.copyfile(viz / "training_step_000020.png", viz / "training_latest.png")
    report = checks.verify(copy)
    assert report.ok, report.lines
    assert any("20 of 30 steps" in line for line in report.lines)


@pytest.mark.long
def test_a_resume_says_and_notes_that_a_file_beside_the_ledger_was_changed(copy):
    shutil.rmtree(copy / "checkpoint-40")
    change_lines(copy / "passports.jsonl", lambda lines: [lines[0].replace('"step": 0', '"step": 1'), *lines[1:]])
    done = run_script("--output_dir", str(copy), "--resume_from_checkpoint", "true", "--max_steps", "40")
    assert done.returncode == 0, done.stderr
    assert "passports.jsonl: what it held at checkpoint-30 was changed" in done.stderr
    found = findings(copy)["growing files"]
    assert found["ok"] and "noted at a resume as changed before: passports.jsonl" in found["words"]


def test_a_run_without_checkpoints_and_views_holds(copy):
    for path in [*copy.glob("checkpoint-*"), copy / "training_viz"]:
        shutil.rmtree(path)
    report = checks.verify(copy)
    assert report.ok, report.lines
    assert "none there" in " ".join(report.lines)


def test_a_manifest_without_a_chain_is_not_recorded(copy):
    change_json(copy / "checkpoint-20/manifest.json", lambda manifest: manifest.pop("chain"))
    found = findings(copy)["checkpoint chain"]
    assert found["ok"] and found["words"] == "3 agree with the ledger; of 1 not recorded"


def test_a_document_trained_twice_is_a_note(copy):
    def change(lines: list[str]) -> list[str]:
        lines[9] = lines[9].replace('"row":9,', '"row":4,')
        return lines

    change_lines(copy / "ledger.jsonl", change)
    found = findings(copy)["documents"]
    assert found["ok"]
    assert (
        "note: 1 trained twice, the first example_train_0.jsonl.zst row 4 (rows 4 and 9 of the ledger)"
        in found["words"]
    )
    with open(copy / "run_config.yaml", "a", encoding="utf-8") as file:
        file.write("epochs: 2\n")
    found = findings(copy)
    assert "several passes" in found["documents"]["words"] and not found["configuration"]["ok"]


def test_what_is_no_run_is_one_sentence(tmp_path):
    done = run_command("verify", str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {tmp_path}: no run.json in it; expected the folder of a run\n"


def test_importing_it_loads_nothing_heavy():
    code = "import sys, slimpajama_hf.lookback.checks; sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT).returncode == 0


# ---- verify RUN --replay A:B ----


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_steps_done_again_are_bit_equal_and_the_run_is_not_touched(finished):
    before = contents(finished)
    done = run_command("verify", str(finished), "--replay", "12:25")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[0] == "ok      steps 12 to 24 replayed from checkpoint-10: bit-equal"
    assert "25/25" in done.stderr  # something moved
    assert contents(finished) == before


@pytest.mark.long
def test_a_replay_names_the_step_and_the_field_that_was_edited(copy):
    flip_a_digit_of_the_loss(copy, 23)
    honest = read_ledger(copy)[22]["loss"]
    done = run_command("verify", str(copy), "--replay", "21:25", "--json")
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert (report["started_at"], report["steps_that_differ"]) == (20, 1)
    (found,) = report["differences"]
    assert (found["step"], found["field"], found["ledger"]) == (23, "loss", read_ledger(copy)[23]["loss"])
    assert found["replayed"] != found["ledger"] and honest == read_ledger(copy)[22]["loss"]


def test_a_replay_without_checkpoints_starts_from_nothing(copy):
    """The warm-up is written as a fraction of the run: with --max_steps 5 it would be another."""
    for path in copy.glob("checkpoint-*"):
        shutil.rmtree(path)
    change_lines(
        copy / "run_config.yaml",
        lambda lines: [line.replace("warmup_steps: 20", "warmup_steps: 0.5") for line in lines],
    )
    assert "warmup_steps: 0.5" in (copy / "run_config.yaml").read_text()
    done = run_command("verify", str(copy), "--replay", "0:5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[0] == "ok      steps 0 to 4 replayed from the very start: bit-equal"


def test_a_damaged_checkpoint_is_passed_over(copy):
    flip_a_byte(copy / "checkpoint-30/optimizer.pt")
    (copy / "checkpoint-20/manifest.json").write_text("[]")
    start, notes = replay.nearest_checkpoint(run.Run(copy), 35)
    assert start == 10
    assert notes == [
        "checkpoint-30 passed over: optimizer.pt is not what was saved (its SHA-256 differs)",
        "checkpoint-20 passed over: its manifest is not one of ours",
    ]


@pytest.mark.parametrize(
    ("cursor", "exact", "shuffled", "wrong"),
    [
        ({"shard": "a", "row": 8}, True, False, None),
        ({"shard": "a", "row": 9}, True, False, "goes on at a row 9, its last document was a row 7"),
        ({"shard": "b", "row": 0}, True, False, "goes on at b row 0, its last document was a row 7"),
        ({"shard": "a", "row": 7, "token": 256}, False, False, None),
        ({"shard": "b", "row": 0, "token": 9}, False, False, None),
        ({"shard": "a", "row": 6}, False, False, "goes back to a row 6, its last document was row 7"),
        ({"shard": "a", "row": 0, "used": 3, "size": 64}, True, True, None),
        ({"shard": "a", "row": 64}, True, True, None),
        ({"shard": "a", "row": 0, "used": 64, "size": 64}, True, True, "record 64 of a shuffled block of 64"),
        ({"row": 8}, True, False, "no cursor can be read in data_state.json"),
    ],
)
def test_a_cursor_is_held_against_the_row_before_it(tmp_path, cursor, exact, shuffled, wrong):
    path = tmp_path / "data_state.json"
    path.write_text(json.dumps({"cursor": cursor}))
    assert checkpoint_checks._cursor_problem(path, {"shard": "a", "row": 7}, exact, shuffled) == wrong


@pytest.mark.parametrize("text", ["5", "5:5", "7:3", "a:b", "-1:4", "1:2:3"])
def test_what_is_no_range_is_refused(text):
    with pytest.raises(UsageError, match="expected A:B"):
        replay.parse_range(text)


def test_steps_that_the_run_has_not_got_are_refused(finished):
    with pytest.raises(UserError, match=r"has 40 steps; expected A:B with 0 <= A < B <= 40"):
        replay.replay(finished, 30, 41)
    done = run_command("verify", str(finished), str(finished), "--replay", "1:2")
    assert done.returncode == 2 and "leave the second folder out" in done.stderr


def test_a_replay_reaches_nothing_outside_and_keeps_the_schedule():
    config = {"seed": 1, "push_to_hub": True, "hub_model_id": "me/run", "report_to": ["wandb"], "eval_steps": 5,
              "output_dir": "runs/x", "max_steps": 1001, "warmup_steps": "0.1", "learning_rate": 0.001}  # fmt: skip
    assert replay.replayed_config(config) == {
        "seed": 1,
        "max_steps": 1001,
        "warmup_steps": 101,
        "learning_rate": 0.001,
    }


# ---- verify RUN OTHER ----


@pytest.fixture(scope="module")
def shorter(tmp_path_factory: pytest.TempPathFactory, finished: Path, shards: Path) -> Callable[[int], Path]:
    """Runs of 10 steps, otherwise as `finished`, by their seed."""
    runs: dict[int, Path] = {}

    def make(seed: int) -> Path:
        if seed not in runs:
            run = tmp_path_factory.mktemp("shorter") / f"seed-{seed}"
            done = run_script(
                *NANO, "--dataset", f"{shards}/*.jsonl.zst", "--max_steps", "10", "--display_samples", "10", "--precision",
                "float32", "--warmup_steps", "20", "--viz_interval", "20", "--output_dir", str(run), "--seed", str(seed),
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            runs[seed] = run
        return runs[seed]

    return make


def test_a_run_is_the_same_as_its_copy(finished, copy):
    report = side_by_side.compare(finished, copy)
    assert report.ok
    assert report.lines[0] == "the same for 40 steps"
    assert report.data["weights_equal"] == {10: True, 20: True, 30: True, 40: True}
    assert report.data["configuration"] == {}


@pytest.mark.long
def test_a_shorter_run_with_the_same_seed_is_the_beginning_of_the_longer(finished, shorter):
    done = run_command("verify", str(finished), str(shorter(42)))
    assert done.returncode == 0, done.stdout + done.stderr
    first, *others = done.stdout.splitlines()
    assert first == f"the same for 10 steps; there {shorter(42)} ends, and {finished} goes on"
    assert "checkpoint-10: model.safetensors equal" in others
    assert "max_steps: 40 / 10" in others


@pytest.mark.long
def test_another_seed_parts_at_the_first_step(finished, shorter):
    done = run_command("verify", str(shorter(42)), str(shorter(7)), "--json")
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["parts_at"] == report["same_steps"] == 0
    left, right = (read_ledger(shorter(seed))[0] for seed in (42, 7))
    assert report["differences"]["loss"] == [left["loss"], right["loss"]]
    # The same document, read by other weights.
    assert not {"text_sha1", "tokens", "shard", "chain", "throughput"} & report["differences"].keys()
    assert report["configuration"] == {"seed": [42, 7]}
    assert report["weights_equal"] == {"10": False}


def test_runs_part_where_the_first_row_differs(finished, copy):
    _rewrite_from_25(copy)
    sha1 = read_ledger(finished)[25]["text_sha1"]
    report = side_by_side.compare(finished, copy)
    assert not report.ok
    assert report.lines[0] == f'they part at step 25: text_sha1 "{sha1}" / "{"0" * 40}"'


def test_equal_ledgers_with_other_weights_are_not_the_same_run(finished, copy):
    flip_a_byte(copy / "checkpoint-20/model.safetensors")
    report = side_by_side.compare(finished, copy)
    assert not report.ok
    assert "checkpoint-20: model.safetensors differs" in report.lines


def test_a_ledger_with_a_hole_is_not_compared(finished, copy):
    _drop(17)(copy)
    with pytest.raises(UserError, match="step 17: its line holds step 18"):
        side_by_side.compare(finished, copy)


@pytest.mark.parametrize(
    ("left", "right", "differ"),
    [
        ({"loss": 1.0}, {"loss": 1.0000000000000002}, {"loss"}),
        ({"loss": 0.0}, {"loss": -0.0}, {"loss"}),
        ({"loss": 1}, {"loss": 1.0}, {"loss"}),
        ({"loss": None}, {"loss": None}, set()),
        ({"loss": None}, {}, set()),
        ({"throughput": 1.0, "step_seconds": 2.0}, {"throughput": 3.0, "step_seconds": 4.0}, set()),
        ({"loss": 1.0, "chain": "a"}, {"loss": 2.0, "chain": "b"}, {"loss"}),
        ({"loss": 1.0, "chain": "a"}, {"loss": 1.0, "chain": "b"}, {"chain"}),
    ],
)
def test_rows_are_compared_bit_by_bit(left, right, differ):
    assert side_by_side.differences(left, right).keys() == differ
