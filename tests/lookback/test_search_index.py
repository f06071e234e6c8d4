"""`python -m slimpajama_hf inspect RUN --find TEXT`: no false yes, no false no, and what was read apart from what was cut."""

from __future__ import annotations

import json
import random
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from slimpajama_hf import __main__
from slimpajama_hf.commands import inspect
from slimpajama_hf.errors import UsageError, UserError
from slimpajama_hf.lookback import inspection, reread, search_finding, search_growing, search_index
from slimpajama_hf.record import ledger
from slimpajama_hf.record.run_folder import RunFolder
from tests.conftest import ROOT, environment, make_records, read_ledger, run_command, write_records
from tests.lookback.test_inspection import HOSTILE, copy_of
from tests.untrained import make_run

if TYPE_CHECKING:
    from slimpajama_hf.corpus.documents import Document


QUOTES = "she said \"yes\" AND * NOT (no) OR NEAR/3 col:umn ^begin -minus + 'single' 100% _under_ \\back"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 documents in two files, some of them odd, one of them twice."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [record["text"] for record in make_records(190, seed=11)]
    texts += [*HOSTILE, QUOTES, texts[3], "ab", "Straße İstanbul ﬁne ǅ café cafe\u0301", "一二三四五六七八九十" * 30]
    draw = random.Random(5)
    draw.shuffle(texts)
    write_records(
        folder / "one.jsonl.zst",
        [{"text": text, "meta": {"redpajama_set_name": "RedPajamaC4"}} for text in texts[:120]],
    )
    write_records(folder / "two.jsonl", [{"text": text} for text in texts[120:]])
    return folder


def truth(folder: RunFolder, encoder: Any) -> list[tuple[str, list[tuple[int, int, int]]]]:
    """(text, [(step, first character, character behind the last)]) of each document, cut into tokens again."""
    record = folder.read_record()
    found = reread.corpus_of(record)
    documents: dict[tuple[str, int], tuple[Document, list[tuple[int, int, int]]]] = {}
    for row in read_ledger(folder.path):
        places = reread.places(row, record["model"]["sample_mode"], record["model"]["max_seq_length"])
        read = reread.read_places(found, places)
        tokens = reread.tokens_again(encoder, places, read, record["model"]["sample_mode"])
        for number, (place, document) in enumerate(zip(places, read, strict=True)):
            entry = documents.setdefault((place.shard, place.row), (document, []))
            entry[1].append((row["step"], *reread.covered(tokens, number)))
    return [(document.text, trained) for document, trained in documents.values()]


def expected(documents: list[tuple[str, list[tuple[int, int, int]]]], wanted: str) -> tuple[set[int], int]:
    """(steps that trained all of `wanted` by themselves, documents that hold it), by looking into every text."""
    pattern = re.compile(r"\s+".join(map(re.escape, wanted.split())))
    steps, holding = set(), 0
    for text, trained in documents:
        spans = [match.span() for match in pattern.finditer(text)]
        holding += bool(spans)
        steps |= {step for step, first, last in trained for start, end in spans if first <= start and end <= last}
    return steps, holding


def wanted_texts(documents: list[tuple[str, Any]], count: int) -> list[str]:
    """Pieces of the documents of all lengths, some of them spoiled, some across two."""
    draw = random.Random(3)
    pieces = [
        "the",
        "a",
        "e",
        "zq",
        "no such words anywhere",
        QUOTES,
        "日本",
        "👩‍👩",
        "\x1b[31m",
        '"',
        "*",
        "AND",
        "STRASSE",
        "café",
    ]
    while len(pieces) < count:
        text = draw.choice(documents)[0]
        start = draw.randrange(len(text))
        piece = text[start : start + draw.choice([1, 2, 3, 4, 10, 40, 200, 3000])]
        kind = draw.randrange(6)
        if kind == 0:
            place = draw.randrange(len(piece))
            piece = piece[:place] + draw.choice("xyz \n9") + piece[place + 1 :]
        elif kind == 1:
            piece += draw.choice(documents)[0][:5]
        elif kind == 2:
            piece = piece.swapcase()
        elif kind == 3:
            piece = re.sub(r"\s", lambda _: draw.choice([" ", "\n\t", "   "]), piece)
        if piece.strip():
            pieces.append(piece)
    return pieces


@pytest.mark.parametrize(
    ("mode", "more"),
    [("truncate", {}), ("window", {}), ("pack", {}), ("truncate", {"shuffle_buffer": 50, "seed": 1}), ("truncate", {"epochs": 2})],
    ids=["truncate", "window", "pack", "shuffled", "two passes"],
)  # fmt: skip
def test_it_says_what_looking_into_every_text_says(tmp_path, corpus, encoder, mode, more):
    folder = make_run(tmp_path / "run", f"{corpus}/*", encoder, mode, **more)
    documents = truth(folder, encoder)
    extent = search_growing.extend(folder)
    assert extent.steps == len(read_ledger(folder.path)) and extent.documents == len(documents) and not extent.missing
    read_somewhere = 0
    for wanted in wanted_texts(documents, 250):
        steps, holding = expected(documents, wanted)
        matches = search_finding.find(folder, wanted)
        assert len(matches) == holding, wanted
        assert {read.step for match in matches for read in match.reads if read.whole} == steps, wanted
        if mode == "truncate":
            assert any(match.read for match in matches) == bool(steps), wanted
        for match in matches:
            # No false yes: what is shown is the text.
            assert match.text.split() == wanted.split()
        read_somewhere += bool(steps)
    assert 60 < read_somewhere < 240


def test_without_trigrams_it_says_the_same(tmp_path, corpus, encoder):
    """SQLite without FTS5: all texts are looked into."""
    folder = make_run(tmp_path / "run", f"{corpus}/*", encoder)
    search_growing.extend(folder)
    pieces = wanted_texts(truth(folder, encoder), 100)
    before = [search_finding.find(folder, wanted) for wanted in pieces]
    with sqlite3.connect(search_index.path_of(folder)) as connection:
        connection.execute("DROP TABLE trigrams")
    assert [search_finding.find(folder, wanted) for wanted in pieces] == before


def test_a_text_over_the_border_of_two_windows_was_read_by_both(tmp_path, corpus, encoder):
    folder = make_run(tmp_path / "run", f"{corpus}/*", encoder, "window")
    search_growing.extend(folder)
    text, trained = next((text, trained) for text, trained in truth(folder, encoder) if len(trained) > 3)
    (first, _, border), (second, again, _) = sorted(trained)[1:3]
    assert border == again
    (match,) = search_finding.find(folder, text[border - 40 : border + 40])
    assert match.read and [(read.step, read.whole) for read in match.reads] == [(first, False), (second, False)]


def test_what_was_cut_is_told_apart(tmp_path, corpus, encoder):
    folder = make_run(tmp_path / "run", f"{corpus}/*", encoder)
    search_growing.extend(folder)
    text, ((step, _, end),) = next(
        (text, trained) for text, trained in truth(folder, encoder) if trained[0][2] + 200 < len(text)
    )
    start = text.index(" ", end - 60) + 1
    (inside,) = search_finding.find(folder, text[start:end])
    assert inside.read and inside.reads == (search_finding.Read(step, start, end, True),)
    (border,) = search_finding.find(folder, text[end - 30 : end + 30])
    assert not border.read and [read.whole for read in border.reads] == [False]
    (behind,) = search_finding.find(folder, text[end + 10 : end + 100])
    assert not behind.read and not behind.reads and behind.document_steps == (step,)


# ---- it grows and shrinks with the ledger ----


def content(folder: RunFolder) -> list[Any]:
    """Everything in the index but the ids of its documents."""
    with sqlite3.connect(search_index.path_of(folder)) as connection:
        steps = connection.execute("SELECT step, chain, trouble FROM steps ORDER BY step").fetchall()
        trained = connection.execute(
            "SELECT step, shard, row, hex(sha1), text, start, end FROM trained JOIN documents ON id = document "
            "ORDER BY step, shard, row"
        ).fetchall()
        alone = connection.execute(
            "SELECT count(*) FROM documents WHERE id NOT IN (SELECT document FROM trained)"
        ).fetchall()
    return [steps, trained, alone]


def test_an_index_that_grew_is_one_that_was_made_at_once(tmp_path, corpus, encoder, monkeypatch):
    monkeypatch.setattr(search_growing, "CHUNK_STEPS", 37)
    folder = make_run(tmp_path / "run", f"{corpus}/*", encoder)
    whole = folder.ledger.read_bytes()
    lines = whole.splitlines(keepends=True)
    for count in (1, 20, 20, 93, len(lines)):
        # A torn last line is a row that is being written.
        folder.ledger.write_bytes(b"".join(lines[:count]) + lines[0][:30] * (count < len(lines)))
        assert search_growing.extend(folder).steps == count
    grown = content(folder)
    search_index.path_of(folder).unlink()
    search_growing.extend(folder)
    assert content(folder) == grown


def test_what_a_resume_took_back_is_taken_out(tmp_path, corpus, encoder):
    """The ledger is cut back to step 50 and goes on with other documents; then a new run starts in the folder."""
    folder = make_run(tmp_path / "run", f"{corpus}/*", encoder, steps=90)
    search_growing.extend(folder)
    gone = truth(folder, encoder)[70][0]
    assert any(match.read for match in search_finding.find(folder, gone[:80]))
    rows = read_ledger(folder.path)
    other = read_ledger(make_run(tmp_path / "other", f"{corpus}/two.jsonl", encoder, steps=30).path)
    corpus_record = json.loads(folder.record.read_text())
    chain, kept = rows[49]["chain"], rows[:50]
    for row in other:
        row = row | {"step": len(kept)}
        chain = row["chain"] = ledger.chain_hash(chain, row)
        kept.append(row)
    folder.ledger.write_text("".join(ledger.encode(row) + "\n" for row in kept))
    assert search_growing.extend(folder).steps == 80
    assert not any(match.read for match in search_finding.find(folder, gone[:80]))
    assert any(step == 60 for step, *_ in content(folder)[1])
    # Made anew it is the same.
    grown = content(folder)
    search_index.path_of(folder).unlink()
    search_growing.extend(folder)
    assert content(folder) == grown
    make_run(tmp_path / "run", f"{corpus}/two.jsonl", encoder, steps=5)
    assert search_growing.extend(folder).documents == 5
    assert corpus_record["run_id"] == "untrained"


def test_a_damaged_index_is_made_again(tmp_path, corpus, encoder):
    folder = make_run(tmp_path / "run", f"{corpus}/*", encoder, steps=20)
    search_growing.extend(folder)
    before = content(folder)
    search_index.path_of(folder).write_bytes(b"no database " * 1000)
    assert search_growing.extend(folder).steps == 20
    assert content(folder) == before
    with sqlite3.connect(search_index.path_of(folder)) as connection:
        connection.execute("UPDATE meta SET value = '0' WHERE name = 'version'")
    assert search_growing.extend(folder).steps == 20
    assert content(folder) == before


def test_it_stops_when_it_is_told_to(tmp_path, corpus, encoder, monkeypatch):
    monkeypatch.setattr(search_growing, "CHUNK_STEPS", 10)
    folder = make_run(tmp_path / "run", f"{corpus}/*", encoder)
    asked = iter([False] * 40 + [True] * 1000)
    assert search_growing.extend(folder, stop=lambda: next(asked)).steps == 30
    assert search_growing.extend(folder).steps == len(read_ledger(folder.path))


def test_two_processes_at_once_make_one_index(tmp_path, corpus, encoder):
    folder = make_run(tmp_path / "run", f"{corpus}/*", encoder)
    code = (
        "import sys; from pathlib import Path\n"
        "from slimpajama_hf.lookback import search_growing; from slimpajama_hf.record.run_folder import RunFolder\n"
        "search_growing.CHUNK_STEPS = 5\n"
        f"print(search_growing.extend(RunFolder(Path({str(folder.path)!r}))).steps)"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment(), cwd=ROOT)
        for _ in range(2)
    ]
    assert [int(each.communicate()[0]) for each in both] == [len(read_ledger(folder.path))] * 2
    grown = content(folder)
    search_index.path_of(folder).unlink()
    search_growing.extend(folder)
    assert content(folder) == grown


# ---- a corpus that is not there any more ----


def test_where_a_text_cannot_be_had_again_there_is_no_no(tmp_path, corpus, encoder):
    here = Path(shutil.copytree(corpus, tmp_path / "corpus"))
    folder = make_run(tmp_path / "run", f"{here}/*", encoder)
    first = truth(folder, encoder)[0][0]
    write_records(here / "two.jsonl", [{"text": "changed"}] * 80)
    extent = search_growing.extend(folder)
    rows = read_ledger(folder.path)
    assert [step for step, _ in extent.missing] == [row["step"] for row in rows if row["shard"] == "two.jsonl"]
    with pytest.raises(
        UserError, match=r"not read in 120 steps, but the text of 79 others cannot be had again .*two.jsonl row 0"
    ):
        inspect.find_text(str(folder.path), "no such words anywhere", False)
    # A yes stays a yes.
    assert inspect.find_text(str(folder.path), first[:30], False) == 0
    # And when the corpus is back, so is the no.
    shutil.copyfile(corpus / "two.jsonl", here / "two.jsonl")
    assert not search_growing.extend(folder).missing
    assert inspect.find_text(str(folder.path), "no such words anywhere", False) == 0


# ---- the command ----


def test_a_run_that_is_done_is_indexed_already(finished):
    """Nothing is read again when somebody searches: the index of the run's end has all of its documents."""
    rows = read_ledger(finished)
    with sqlite3.connect(f"file:{search_index.path_of(RunFolder(finished))}?mode=ro", uri=True) as connection:
        indexed = connection.execute("SELECT step, chain FROM steps ORDER BY step").fetchall()
        trained = {step for (step,) in connection.execute("SELECT step FROM trained")}
    assert indexed == [(row["step"], row["chain"]) for row in rows]
    assert trained == {row["step"] for row in rows}


def test_a_sentence_is_found_with_its_step_and_its_loss(finished, tmp_path, capsys):
    run = copy_of(finished, tmp_path / "run")
    found = inspection.inspect(run, 17)
    start = next(
        index for index, token in enumerate(found.tokens) if index > 5 and found.text_of(token).startswith(" ")
    )
    own = range(start, start + 12)
    sentence = "".join(found.text_of(found.tokens[index]) for index in own).strip()
    done = run_command("inspect", str(run), "--find", sentence)
    assert done.returncode == 0, done.stderr
    row = read_ledger(run)[17]
    assert f"“{sentence}” was read at step 17, of 40 steps of {run}" in done.stdout
    assert f"loss {row['loss']:.4f} (" in done.stdout and "for these 12 tokens)" in done.stdout
    assert f"{row['shard']} row {row['row']}, character" in done.stdout
    assert __main__.main(["inspect", str(run), "--find", sentence, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["read"] and answer["steps_searched"] == 40
    (loss,) = answer["losses"]
    assert (loss["step"], loss["loss"], loss["text_tokens"]) == (17, row["loss"], 12)
    assert loss["text_loss"] == pytest.approx(found.then[[index - 1 for index in own]].mean(), abs=1e-5)
    assert __main__.main(["inspect", str(run), "--find", "No such sentence was ever written."]) == 0
    assert "was not read: it is in no document of the 40 steps" in " ".join(capsys.readouterr().out.split())


def test_what_is_only_in_the_cut_part_was_not_read(finished, tmp_path, capsys):
    run = copy_of(finished, tmp_path / "run")
    step = next(row["step"] for row in read_ledger(run) if row["tokens_cut"] > 100)
    text = inspection.inspect(run, step).documents[0].text
    assert __main__.main(["inspect", str(run), "--find", text[-80:]]) == 0
    written = " ".join(capsys.readouterr().out.split())
    assert "was not read: it stands in a document of the 40 steps" in written
    assert f"step {step} cut: outside what it trained" in written


def test_what_cannot_be_looked_for_is_refused(finished):
    with pytest.raises(UsageError, match="nothing but white space"):
        inspect.find_text(str(finished), " \t", False)
    with pytest.raises(UsageError, match="not UTF-8"):
        inspect.find_text(str(finished), "a\udcff", False)
    with pytest.raises(UserError, match=r"no run\.json in it"):
        inspect.find_text(str(finished.parent), "a", False)
