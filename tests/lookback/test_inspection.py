"""`python -m slimpajama_hf inspect RUN --step N`: the tokens that were trained, and what the model made of them."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import pty
import re
import shutil
import struct
import sys
import termios
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from slimpajama_hf import __main__, terminal
from slimpajama_hf.commands import inspect
from slimpajama_hf.corpus import documents, opening
from slimpajama_hf.errors import UserError
from slimpajama_hf.lookback import inspection, reread
from slimpajama_hf.lookback.reread import Place
from slimpajama_hf.samples.stream import SampleStream
from tests.conftest import NANO, ROOT, environment, make_text, read_ledger, run_command, run_script, write_records
from tests.untrained import make_run

HOSTILE = [
    "plain words, and\x1b[31m red\x1b[0m ones \x07 \x00 end",
    "right \u202eto left\u202c and \u2066isolated\u2069, zero\u200bwidth\u200djoined \ufeff",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \U0001f9ff 你好，世界 مرحبا",
    "<script>alert('x')</script> [bold]not markup[/bold] :smile: </s> <|endoftext|>",
    "tabs\tand\r\nline ends\n\n\nand   spaces  \u00a0\u3000 \u2028 \u2029 done   ",
]


def copy_of(run: Path, target: Path, shards: Path | None = None) -> Path:
    """A copy of a run, that reads its corpus from another folder."""
    shutil.copytree(run, target)
    if shards is not None:
        record = json.loads((target / "run.json").read_text())
        for entry in record["corpus"]["files"]:
            entry[1] = str(shards / entry[0])
        (target / "run.json").write_text(json.dumps(record))
    return target


@pytest.fixture(scope="session")
def other_modes(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> dict[str, Path]:
    """Runs of 30 steps of 64 tokens that cut documents into windows, and that join them."""
    runs = {}
    for mode in ("window", "pack"):
        runs[mode] = tmp_path_factory.mktemp("modes") / mode
        done = run_script(
            *NANO, "--dataset", f"{shards}/*.jsonl.zst", "--max_steps", "30", "--save_steps", "10", "--display_samples", "30",
            "--viz_interval", "30", "--warmup_steps", "20", "--output_dir", str(runs[mode]), "--precision", "float32",
            "--sample_mode", mode, "--max_seq_length", "64",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    return runs


# ---- the tokens ----


@pytest.mark.parametrize("mode", ["truncate", "window", "pack"])
@pytest.mark.long
def test_the_tokens_of_a_step_are_those_that_were_trained(finished, other_modes, mode):
    """Put before the checkpoint that was saved just before the step, they give the step's own loss."""
    run = finished if mode == "truncate" else other_modes[mode]
    rows = read_ledger(run)
    for step in (10, 20) if mode != "truncate" else (10, 20, 30):
        found = inspection.inspect(run, step, checkpoint=step)
        assert len(found.tokens) == rows[step]["tokens"]
        assert found.now.nats.mean() == pytest.approx(rows[step]["loss"], abs=1e-5)
        assert found.now.accuracy == pytest.approx(rows[step]["accuracy"], abs=1e-6)
        # What was kept of the step itself says the same.
        assert found.then_source == "surprisals.f32" and not found.notes
        np.testing.assert_allclose(found.then, found.now.nats, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", ["truncate", "window", "pack"])
def test_every_sample_is_found_again(tmp_path, encoder, mode):
    """All of a corpus with what is odd in it: texts that steer terminals, books, last windows of one token."""
    texts = [*HOSTILE, make_text(1, 60_000), make_text(2, 30)]
    _, ends = encoder.encode(make_text(3, 80))
    texts += [make_text(3, 80)[: ends[32]], make_text(3, 80)[: ends[33]]]  # 33 and 34 tokens
    assert [len(encoder.encode(text)[0]) % 32 for text in texts[-2:]] == [1, 2]
    path = write_records(tmp_path / "odd.jsonl", [{"text": text} for text in texts])
    corpus = opening.open_corpus(str(path))
    stream = SampleStream(corpus, encoder, mode, 32)
    for sample in itertools.islice(stream, 4000):
        document = sample.document
        row = {"step": 0, "shard": document.shard, "row": document.row, "text_sha1": document.sha1, "part": sample.part,
               "tokens": len(sample.input_ids), "documents": sample.documents}  # fmt: skip
        if document.row == 5 and sample.part % 500:
            continue  # a book is cut into tokens anew for each of its windows
        places = reread.places(row, mode, 32)
        tokens = reread.tokens_again(encoder, places, reread.read_places(corpus, places), mode)
        assert [token.id for token in tokens] == sample.input_ids


@pytest.mark.long
def test_a_run_in_bfloat16_says_how_far_its_checkpoints_are_from_it(shards, tmp_path):
    run = tmp_path / "run"
    done = run_script(
        *NANO, "--dataset", f"{shards}/*.jsonl.zst", "--max_steps", "6", "--save_steps", "5", "--precision", "bfloat16",
        "--output_dir", str(run),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = inspection.inspect(run, 5, checkpoint=5)
    (note,) = found.notes
    assert "trained in bfloat16, a checkpoint is asked in float32" in note
    said = float(note.partition("here by ")[2].split()[0])
    assert said == pytest.approx(abs(found.now.nats.mean() - found.row["loss"]), abs=1e-4)
    # What was kept is what was trained, to the last digit.
    assert found.then.mean() == pytest.approx(found.row["loss"], abs=1e-5)


def test_tokens_joined_are_the_text(finished, shards):
    found = inspection.inspect(finished, 7)
    start, end = reread.covered(found.tokens, 0)
    assert start == 0
    assert "".join(map(found.text_of, found.tokens)) == found.documents[0].text[:end]


@pytest.mark.long
def test_a_packed_step_has_all_its_documents(other_modes):
    run = other_modes["pack"]
    step = next(row["step"] for row in read_ledger(run) if len(row["documents"]) > 1 and row["part"])
    found = inspection.inspect(run, step)
    assert len(found.places) > 1 and found.places[0].first_token > 0
    text = "".join(map(found.text_of, found.tokens))
    assert "</s>" in text
    for part, document in zip(text.split("</s>"), found.documents, strict=True):
        assert part in document.text


@pytest.mark.long
def test_packed_rows_of_older_versions_are_refused_by_name(other_modes):
    row = read_ledger(other_modes["pack"])[3] | {"documents": []}
    with pytest.raises(UserError, match="step 3: its row does not say which documents"):
        reread.places(row, "pack", 64)


# ---- the corpus ----


def test_another_document_in_its_place_is_refused(finished, shards, tmp_path):
    changed = Path(shutil.copytree(shards, tmp_path / "shards"))
    name = "example_train_0.jsonl.zst"
    records = [{"text": "another text altogether"} for _ in range(30)]
    write_records(changed / name, records)
    run = copy_of(finished, tmp_path / "run", changed)
    done = run_command("inspect", str(run), "--step", "12")
    assert done.returncode == 1
    row = read_ledger(run)[12]
    # What the ledger says is shown all the same.
    assert f"{row['loss']:.4f} nats per token" in done.stdout and "another text" not in done.stdout
    assert f"error: {name} row 12: another document than the one that was trained" in done.stderr
    assert row["text_sha1"] in done.stderr and "Traceback" not in done.stderr
    (changed / name).unlink()
    with pytest.raises(UserError, match=r"row 12: no such file any more; put .* back as it was"):
        inspection.inspect(run, 12)
    write_records(changed / name, records[:5])
    with pytest.raises(UserError, match="row 12: the file has no such row any more"):
        inspection.inspect(run, 12)


def test_an_unchanged_row_of_a_longer_file_is_found(finished, shards, tmp_path):
    """The hash of the document decides, not that of its file."""
    from backports import zstd

    changed = Path(shutil.copytree(shards, tmp_path / "shards"))
    name = changed / "example_train_0.jsonl.zst"
    name.write_bytes(zstd.compress(zstd.decompress(name.read_bytes()) + b'{"text": "more"}\n'))
    found = inspection.inspect(copy_of(finished, tmp_path / "run", changed), 29)
    assert found.documents[0].sha1 == found.row["text_sha1"]


def test_documents_asked_for_in_order_are_read_in_one_go(shards, monkeypatch):
    corpus = opening.open_corpus(f"{shards}/*.jsonl.zst")
    records = list(corpus.records(documents.Cursor()))[:40]
    opened = []
    real = reread.read_shard
    monkeypatch.setattr(reread, "read_shard", lambda shard, row, *more: opened.append(row) or real(shard, row, *more))
    found = reread.read_places(corpus, [Place(each.shard, each.row, each.sha1, 0, 1) for each in records])
    assert [each.text for each in found] == [each.text for each in records]
    assert opened == [0, 0]
    opened.clear()
    reread.read_places(corpus, [Place(records[n].shard, records[n].row, records[n].sha1, 0, 1) for n in (20, 7)])
    assert opened == [20, 7]


# ---- then and now ----


def test_without_kept_surprisals_the_checkpoint_before_the_step_says_what_was(finished, tmp_path):
    run = copy_of(finished, tmp_path / "run")
    kept = inspection.inspect(run, 20).then
    (run / "surprisals.f32").unlink()
    found = inspection.inspect(run, 20)
    assert found.then_source == "checkpoint-20"
    np.testing.assert_allclose(found.then, kept, rtol=1e-3, atol=1e-3)
    found = inspection.inspect(run, 21)
    assert found.then is None and "--checkpoint M" in found.notes[0]
    assert inspection.inspect(run, 21, checkpoint=40).now.nats.shape == (found.row["tokens"] - 1,)


def test_surprisals_of_another_ledger_are_not_believed(finished, tmp_path):
    run = copy_of(finished, tmp_path / "run")
    values = np.fromfile(run / "surprisals.f32", "<f4")
    (values + np.float32(1)).astype("<f4").tofile(run / "surprisals.f32")
    found = inspection.inspect(run, 21)
    assert found.then is None and "not of this ledger" in found.notes[0]


def test_json_has_every_token_then_and_now(finished, capsys):
    assert __main__.main(["inspect", str(finished), "--step", "20", "--checkpoint", "40", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    row = read_ledger(finished)[20]
    assert found["row"] == row and found["step"] == 20
    first, *others = found["tokens"]
    assert first["then"] is None and first["guesses"] == []
    assert len(others) == row["tokens"] - 1
    assert np.mean([token["then"] for token in others]) == pytest.approx(row["loss"], rel=1e-3)
    assert found["now"]["checkpoint"] == 40 and found["now"]["loss"] < found["then"]["loss"]
    for token in others:
        assert token["difference"] == pytest.approx(token["now"] - token["then"])
        chances = [guess["probability"] for guess in token["guesses"]]
        assert chances == sorted(chances, reverse=True) and len(chances) == 5
        for guess in token["guesses"]:
            if guess["id"] == token["id"]:
                assert -np.log(guess["probability"]) == pytest.approx(token["now"], abs=1e-4)
    (document,) = found["documents"]
    start, end = document["trained_characters"]
    assert document["text"][start:end] == "".join(token["text"] for token in found["tokens"])


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--step", "40"], 1, "--step 40: RUN has steps 0 to 39; name one of them"),
        (["--step", "-1"], 1, "--step -1: RUN has steps 0 to 39; name one of them"),
        (["--step", "3", "--checkpoint", "15"], 1, "--checkpoint 15: RUN has checkpoints 10, 20, 30, 40; name one of them"),
        (["--step", "3", "--find", "x"], 2, "not allowed with argument"),
        ([], 2, "one of the arguments --step --find is required"),
        (["--find", "x", "--checkpoint", "10"], 2, "--tokens and --sample belong to --step"),
        (["--find", " \n"], 2, "nothing but white space"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_one_sentence(finished, words, code, message):
    with pytest.raises(UserError) as error:
        __main__.main(["inspect", str(finished), *words])
    assert error.value.exit_code == code
    assert message.replace("RUN", str(finished)) in str(error.value)


def test_a_damaged_row_and_a_damaged_checkpoint_are_named(finished, tmp_path):
    run = copy_of(finished, tmp_path / "run")
    weights = run / "checkpoint-30" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"checkpoint-30: cannot be loaded .* verify"):
        inspection.inspect(run, 12, checkpoint=30)
    lines = (run / "ledger.jsonl").read_text().splitlines(keepends=True)
    lines[5] = "{\n"
    (run / "ledger.jsonl").write_text("".join(lines))
    with pytest.raises(UserError, match="step 5: not JSON"):
        inspection.inspect(run, 12)
    assert inspection.inspect(run, 4).row["step"] == 4


# ---- the terminal ----


def on_terminal(columns: int, *words: str, **variables: str) -> str:
    """What `python -m slimpajama_hf WORDS` writes to a terminal of so many columns."""
    variables = environment(TERM="xterm-256color", COLORTERM="truecolor", **variables)
    variables.pop("COLUMNS")
    process, terminal_end = pty.fork()
    if process == 0:
        os.chdir(ROOT)
        os.execvpe(sys.executable, [sys.executable, "-m", "slimpajama_hf", *words], variables)
    fcntl.ioctl(terminal_end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    written = b""
    while True:
        try:
            data = os.read(terminal_end, 65536)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        written += data
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0, written
    # What waits is written over in its own line.
    return "\n".join(line.rsplit("\r", 1)[-1] for line in written.decode().replace("\r\n", "\n").split("\n"))


def width(line: str) -> int:
    """Columns that a line takes without its colours."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", line)
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in plain)
    return len(plain) + wide


@pytest.mark.long
def test_in_colour_the_text_shows_what_surprised(finished):
    text = on_terminal(80, "inspect", str(finished), "--step", "3", "--checkpoint", "40")
    assert max(map(width, text.split("\n"))) <= 80
    assert "48;2;127;0;0" in text  # a background for the most surprising
    assert "12 tokens that changed most" in text and "what checkpoint-40 expected" in text
    assert "as it was learned (surprisals.f32)" in text and "under checkpoint-40" in text


def test_without_colour_every_token_has_its_number(finished):
    text = on_terminal(120, "inspect", str(finished), "--step", "3", NO_COLOR="1")
    assert max(map(width, text.split("\n"))) <= 120
    assert not re.search(r"\x1b\[[0-9;]*[34]8;", text)
    row = read_ledger(finished)[3]
    numbers = re.findall(r"^ *(?:\x1b\[\d+m)* *\d+.*›\s+(\d+\.\d\d)\s*$", text, re.M)
    assert len(numbers) == row["tokens"] - 1
    assert np.mean(list(map(float, numbers))) == pytest.approx(row["loss"], abs=0.01)


def test_into_a_pipe_it_is_plain_text(finished, capsys):
    assert __main__.main(["inspect", str(finished), "--step", "3", "--tokens", "5"]) == 0
    written = capsys.readouterr().out
    assert "\x1b" not in written
    row = read_ledger(finished)[3]
    for value in (row["text_sha1"], f"{row['loss']:.4f}", f"{row['accuracy']:.1%}", f"{row['grad_norm']:.4f}"):
        assert value in written
    assert "the 5 tokens that surprised most" in written


def test_a_strangers_text_does_not_steer_the_terminal(tmp_path, encoder):
    write_records(tmp_path / "hostile.jsonl", [{"text": text} for text in HOSTILE])
    make_run(tmp_path / "run", str(tmp_path / "hostile.jsonl"), encoder)
    drawn = terminal.console()
    for step in range(5):
        found = inspection.inspect(tmp_path / "run", step)
        with drawn.capture() as capture:
            inspect.show_passport(drawn, found)
            inspect.show_text(drawn, found, None)
        text = capture.get()
        odd = {char for char in text if unicodedata.category(char) in ("Cc", "Cf", "Zl", "Zp")} - {"\n"}
        assert not odd, odd
        assert json.loads(json.dumps(found.to_dict()))["documents"][0]["text"] == HOSTILE[step]
    assert terminal.visible("\x1b[0m\x00\x7f\x85\u202e\t\r\n") == "␛[0m␀␡‹U+0085›‹U+202E›→␍⏎\n"
    assert terminal.visible(HOSTILE[3]) == HOSTILE[3]


def test_the_passport_says_what_was_odd_about_a_step(finished):
    found = inspection.inspect(finished, 3)
    found.row |= {
        "spike": 7.25, "update_skipped": "not finite", "loss": None, "code_bits": None, "skipped": {"empty": 2},
        "gaps": [{"shard": "a.zst", "row": 7, "reason": "truncated"}],
    }  # fmt: skip
    drawn = terminal.console()
    with drawn.capture() as capture:
        inspect.show_passport(drawn, found)
    text = capture.get()
    for words in (
        "7.25 robust",
        "the update was skipped: not finite",
        "2 empty",
        "a.zst set aside from row 7",
        "— nats",
    ):
        assert words in text
