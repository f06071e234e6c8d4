"""Documents become samples: the right ids, nothing lost, and exact places to go on from."""

from __future__ import annotations

import itertools

import pytest

from slimpajama_hf.corpus import opening
from slimpajama_hf.corpus.documents import Cursor
from slimpajama_hf.errors import UserError
from slimpajama_hf.samples import cutting
from slimpajama_hf.samples.stream import SampleStream, names_of
from tests.conftest import make_records, make_text, write_records

MODES = ("truncate", "window", "pack")


def stream(place, encoder, mode, length=64) -> SampleStream:
    return SampleStream(opening.open_corpus(str(place)), encoder, mode, length)


def test_truncate_keeps_the_first_tokens_and_counts_the_others(shards, encoder):
    made = list(stream(f"{shards}/*", encoder, "truncate"))
    assert len(made) == 90
    for sample in made:
        ids, ends = encoder.encode(sample.document.text)
        assert sample.input_ids == ids[:64]
        covered = sample.document.text if len(ids) <= 64 else sample.document.text[: ends[63]]
        assert sample.text_bytes == len(covered.encode())
        if sample.tokens_cut_exact:
            assert sample.tokens_cut == len(ids) - len(sample.input_ids)
        else:
            assert sample.tokens_cut == pytest.approx(len(ids) - 64, rel=0.2)
    assert any(sample.tokens_cut for sample in made)


def test_windows_joined_are_the_documents(shards, encoder):
    made = list(stream(f"{shards}/*", encoder, "window"))
    by_document = itertools.groupby(made, key=lambda sample: sample.document)
    count = 0
    for document, windows in by_document:
        windows = list(windows)
        ids = encoder.encode(document.text)[0]
        joined = [token for window in windows for token in window.input_ids]
        if len(ids) % 64 == 1 and len(ids) > 1:
            # The last window of one token borrows the token before it.
            assert joined == [*ids[:-1], ids[-2], ids[-1]]
        else:
            assert joined == ids
        assert [window.part for window in windows] == list(range(len(windows)))
        assert all(len(window.input_ids) == 64 for window in windows[:-1])
        assert sum(window.text_bytes for window in windows) == document.size
        count += 1
    assert count == 90


@pytest.mark.parametrize("tokens", [2, 3, 4])
def test_a_last_window_of_one_token_is_not_thrown_away(tmp_path, encoder, tokens):
    text = make_text(1, 60)
    ids = encoder.encode(text)[0]
    length = len(ids) - 1 if tokens == 2 else (len(ids) - 1) // (tokens - 1)
    write_records(tmp_path / "a.jsonl", [{"text": text}])
    made = list(stream(tmp_path / "a.jsonl", encoder, "window", length))
    assert all(len(sample.input_ids) >= 2 for sample in made)
    assert made[-1].input_ids[-1] == ids[-1]


def test_packed_blocks_joined_are_the_documents_joined_by_eos(shards, encoder):
    eos = encoder.tokenizer.eos_token_id
    made = list(stream(f"{shards}/*", encoder, "pack"))
    whole = []
    for record in opening.open_corpus(f"{shards}/*").records(Cursor()):
        whole += [*encoder.encode(record.text)[0], eos]
    joined = [token for sample in made for token in sample.input_ids]
    # A last block of one token predicts nothing; what it leaves out is an EOS, which covers no text.
    assert joined == (whole[:-1] if len(whole) % 64 == 1 else whole)
    assert all(len(sample.input_ids) == 64 for sample in made[:-1])
    total = sum(record.size for record in opening.open_corpus(f"{shards}/*").records(Cursor()))
    assert sum(sample.text_bytes for sample in made) == total


def test_a_packed_block_names_every_document_that_it_is_made_of(shards, encoder):
    eos = encoder.tokenizer.eos_token_id
    whole = {
        (record.shard, record.row): (record.sha1, [*encoder.encode(record.text)[0], eos])
        for record in opening.open_corpus(f"{shards}/*").records(Cursor())
    }
    made = list(stream(f"{shards}/*", encoder, "pack"))
    for sample in made:
        rebuilt = []
        for part in sample.documents:
            sha1, ids = whole[part["shard"], part["row"]]
            assert part["text_sha1"] == sha1 and part["tokens"] > 0
            rebuilt += ids[part["first_token"] : part["first_token"] + part["tokens"]]
        assert rebuilt == sample.input_ids
        assert (sample.documents[0]["shard"], sample.documents[0]["row"]) == (
            sample.document.shard,
            sample.document.row,
        )
    assert max(len(sample.documents) for sample in made) > 2


@pytest.mark.parametrize("mode", MODES)
def test_it_goes_on_after_any_sample_as_if_never_stopped(shards, encoder, mode):
    whole = list(stream(f"{shards}/*", encoder, mode))
    for place in {0, 1, 7, len(whole) // 2, len(whole) - 2}:
        again = stream(f"{shards}/*", encoder, mode)
        again.start = whole[place].after
        rest = list(again)
        assert [sample.input_ids for sample in rest] == [sample.input_ids for sample in whole[place + 1 :]]
        for left, right in zip(rest, whole[place + 1 :], strict=True):
            assert (left.document, left.part, left.text_bytes, left.after) == (
                right.document,
                right.part,
                right.text_bytes,
                right.after,
            )


@pytest.mark.parametrize(
    "text", [make_text(3, 9000), "中文没有空格的长文本，" * 2000, "x" * 30_000 + " end", "a\n" * 19000]
)
def test_a_long_document_in_pieces_has_the_tokens_of_the_whole(monkeypatch, encoder, text):
    monkeypatch.setattr(cutting, "PIECE_CHARACTERS", 5000)
    pieces = list(cutting.tokens_in_pieces(encoder, text))
    assert len(pieces) > 1
    ids, ends = encoder.encode(text)
    assert [token for piece in pieces for token in piece[0]] == ids
    assert [end for piece in pieces for end in piece[1]] == ends


def test_what_was_passed_over_rides_with_the_next_sample(tmp_path, encoder):
    lines = [
        '{"text": null}',
        '{"text": "  "}',
        '{"text": ""}',
        '{"text": "two words here"}',
        "{",
        '{"text": "more words"}',
    ]
    write_records(tmp_path / "a.jsonl", lines)
    made = list(stream(tmp_path / "a.jsonl", encoder, "truncate"))
    assert [sample.skipped for sample in made] == [{"text is null": 1, "blank": 1, "empty": 1}, {"not JSON": 1}]


@pytest.mark.parametrize("mode", ["truncate", "window"])
def test_a_document_of_one_token_is_passed_over(tmp_path, encoder, mode):
    assert len(encoder.encode("the")[0]) == 1
    write_records(tmp_path / "a.jsonl", [{"text": "the"}, {"text": "a longer one"}])
    (sample,) = stream(tmp_path / "a.jsonl", encoder, mode)
    assert sample.skipped == {"fewer than 2 tokens": 1}


def test_a_thousand_unusable_records_in_a_row_are_an_error(tmp_path, encoder):
    write_records(tmp_path / "a.jsonl", [{"text": "good one"}, *[{"text": None}] * 999, {"text": "good too"}])
    assert len(list(stream(tmp_path / "a.jsonl", encoder, "truncate"))) == 2
    write_records(tmp_path / "b.jsonl", [{"text": "good one"}, *[{"content": "x"}] * 1000, *make_records(3)])
    with pytest.raises(UserError, match=r"1,000 records in a row.*b\.jsonl row 1000.*--text_column"):
        list(stream(tmp_path / "b.jsonl", encoder, "truncate"))


def test_packing_without_an_end_of_text_token_is_refused(shards, encoder):
    from slimpajama_hf.samples.encoder import Encoder
    from slimpajama_hf.samples.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("builtin")
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="--sample_mode pack"):
        next(iter(stream(f"{shards}/*", Encoder(tokenizer), "pack")))


@pytest.mark.parametrize("mode", MODES)
def test_what_is_left_out_is_passed_over_and_counted(shards, encoder, mode):
    made = list(stream(f"{shards}/*", encoder, mode))
    gone = made[4]
    document, name = names_of(gone)
    assert name == f"{document}.{gone.part}"
    shorter = stream(f"{shards}/*", encoder, mode)
    shorter.leave_out = frozenset([name])
    left = list(shorter)
    assert [sample.input_ids for sample in left] == [sample.input_ids for sample in made if sample is not gone]
    assert left[4].skipped == {"left out": 1} and not left[5].skipped
    shorter.leave_out = frozenset([document])
    assert [sample.input_ids for sample in shorter] == [
        sample.input_ids for sample in made if names_of(sample)[0] != document
    ]


@pytest.mark.parametrize("busy", [True, False])
def test_a_long_wait_says_whether_the_reader_works(capsys, busy):
    """A thread that computes, and one that waits for a disk: 4 seconds each, one line every 2 seconds."""
    import time

    from slimpajama_hf.samples.read_ahead import read_ahead

    def make(patience):
        end = time.monotonic() + 4.2
        while time.monotonic() < end:
            if not busy:
                time.sleep(0.05)
        yield 1

    assert list(read_ahead(make, 2, 1.0, lambda: False)) == [1]
    said = "it is being read and cut" if busy else "of a processor: the disk is slow, or the machine is busy"
    last = capsys.readouterr().err.splitlines()[-1]
    # On a machine that is busy itself, one that computes has little of a processor too: that is what is said.
    assert said in last or (busy and "the machine is busy" in last)
