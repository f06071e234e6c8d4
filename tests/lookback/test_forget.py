"""`python -m slimpajama_hf forget RUN --documents FILE`: equal to a run that has never read them."""

from __future__ import annotations

import json
import shutil

import pytest

from slimpajama_hf import __main__
from slimpajama_hf.errors import UsageError, UserError
from slimpajama_hf.lookback import checks, forget, side_by_side
from slimpajama_hf.lookback.run import Run
from slimpajama_hf.record import surprisals
from tests.conftest import NANO_UNSEEN, read_ledger, run_command, run_script

#: Steps of the finished run whose documents are to be forgotten: the first lies behind checkpoint-20.
STEPS = (23, 27, 28, 36)


@pytest.fixture(scope="module")
def forgotten(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("forget")
    rows = read_ledger(finished)
    names = [f"{rows[step]['shard']}#{rows[step]['row']}" for step in STEPS[:3]]
    listed = folder / "take-down.txt"
    # The last by its text; two that the run has not read.
    listed.write_text(
        "\n".join(["# a request", *names, "", rows[STEPS[3]]["text_sha1"], "elsewhere#3", "0" * 40]) + "\n"
    )
    done = run_command("forget", str(finished), "--documents", str(listed), "--output_dir", str(folder / "run"))
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stdout


@pytest.mark.long
def test_ledger_and_weights_are_those_of_a_run_that_has_never_read_them(finished, forgotten, shards, tmp_path):
    run, _ = forgotten
    names = list(json.loads((run / "forgotten.json").read_text())["documents"])
    never = tmp_path / "never"
    done = run_script(
        *NANO_UNSEEN, "--dataset", f"{shards}/*.jsonl.zst", "--max_steps", "36", "--save_steps", "10", "--warmup_steps", "20",
        "--output_dir", str(never), "--precision", "float32", "--leave_out", *names,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = side_by_side.compare(run, never)
    assert report.ok and "the same for 36 steps" in report.lines[0], report.lines
    for name in ("checkpoint-36/model.safetensors", "checkpoint-36/optimizer.pt", surprisals.FILE_NAME):
        assert (run / name).read_bytes() == (never / name).read_bytes(), name


def test_what_was_forgotten_is_said_and_certified(finished, forgotten):
    run, said = forgotten
    rows = read_ledger(finished)
    certificate = json.loads((run / "forgotten.json").read_text())
    assert {tuple(each["steps"]) for each in certificate["documents"].values()} == {(step,) for step in STEPS}
    assert {each["text_sha1"] for each in certificate["documents"].values()} == {rows[s]["text_sha1"] for s in STEPS}
    assert certificate["from"]["step"] == 20 and certificate["steps"] == 36
    assert certificate["chain"] == read_ledger(run)[-1]["chain"]
    assert "without 4 documents, from checkpoint-20 on, 36 steps" in said
    assert f"never read by this run: 2 (elsewhere#3, {'0' * 40})" in said
    left = [row["text_sha1"] for row in rows if row["step"] not in STEPS]
    assert [row["text_sha1"] for row in read_ledger(run)] == left
    report = checks.verify(run)
    assert report.ok and any("4 documents are in no row" in line for line in report.lines), report.lines
    assert any("no document was forgotten" in line for line in checks.verify(finished).lines)


@pytest.mark.parametrize("damage", ["a row", "its text elsewhere", "the chain", "the weights", "the configuration"])
def test_verify_sees_a_certificate_that_does_not_hold(forgotten, tmp_path, damage):
    run = tmp_path / "run"
    shutil.copytree(forgotten[0], run)
    path = run / "forgotten.json"
    certificate = json.loads(path.read_text())
    row = read_ledger(run)[5]
    if damage == "a row":
        certificate["documents"][f"{row['shard']}#{row['row']}"] = {"text_sha1": "f" * 40, "steps": [5]}
    elif damage == "its text elsewhere":
        next(iter(certificate["documents"].values()))["text_sha1"] = row["text_sha1"]
    elif damage == "the chain":
        certificate["chain"] = "0" * 32
    elif damage == "the weights":
        certificate["weights_sha256"] = "0" * 64
    else:
        certificate["documents"]["elsewhere#9"] = {"text_sha1": "e" * 40, "steps": []}
    path.write_text(json.dumps(certificate))
    watch = forget._held_against(Run(run))
    words = {
        "a row": "was forgotten, and is learned there", "its text elsewhere": "has the text of a document that was",
        "the chain": "its chain is", "the weights": "its weights are not those", "the configuration": "does not leave",
    }  # fmt: skip
    assert not watch.ok and any(words[damage] in problem for problem in watch.problems), watch
    assert not checks.verify(run).ok


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "it names no document"),
        ("chunk1/x.jsonl.zst", "'chunk1/x.jsonl.zst' (entry 1) names no document; expected shard#row"),
        ("a#1\nb#x\n", "'b#x' (entry 2) names no document"),
    ],
)
def test_a_list_that_is_none_is_a_sentence(finished, tmp_path, content, words):
    path = tmp_path / "list.txt"
    path.write_text(content)
    with pytest.raises(UsageError) as refused:
        __main__.main(["forget", str(finished), "--documents", str(path)])
    assert words in str(refused.value)


def test_what_was_never_read_needs_no_forgetting(finished, tmp_path):
    with pytest.raises(UserError, match="it has read none of the 1 documents"):
        forget.forget(finished, ["elsewhere#1"], str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
