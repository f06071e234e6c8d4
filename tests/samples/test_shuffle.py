"""Shuffling and passes: every record once a pass, in an order of its own, and exact places to go on from."""

from __future__ import annotations

import dataclasses
import json
import random
from typing import TYPE_CHECKING

import pytest

from slimpajama_hf.corpus import opening
from slimpajama_hf.corpus.documents import Cursor
from slimpajama_hf.errors import UserError
from slimpajama_hf.samples import passes
from slimpajama_hf.samples.stream import SampleStream
from tests.conftest import make_records, make_text, write_records

if TYPE_CHECKING:
    from slimpajama_hf.samples.sample import Sample


MODES = ("truncate", "window", "pack")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Three shards of 9, 7 and 8 records: short texts, some of several windows, some unusable."""
    folder = tmp_path_factory.mktemp("small")
    for number, count in enumerate((9, 7, 8)):
        records = make_records(count, seed=50 + number)
        for place, record in enumerate(records):
            record["text"] = make_text(1000 * number + place, (3, 20, 90)[place % 3])
        records[2]["text"] = "" if number == 1 else records[2]["text"]
        write_records(folder / f"{number}.jsonl.zst", records)
    return folder


def stream(place, encoder, mode, **how) -> SampleStream:
    return SampleStream(opening.open_corpus(f"{place}/*"), encoder, mode, 32, **{"read_ahead": 0, **how})


def comparable(sample: Sample):
    return (
        sample.input_ids, sample.document, sample.after, sample.text_bytes, sample.part, sample.skipped, sample.gaps,
        sample.tokens_cut,
    )  # fmt: skip


def kept(cursor: Cursor) -> Cursor:
    """A cursor after its journey through a checkpoint."""
    return Cursor(**json.loads(json.dumps(dataclasses.asdict(cursor))))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("buffer", "epochs"), [(0, 2), (5, 1), (7, 2), (100, 2)])
def test_it_goes_on_after_every_sample_as_if_never_stopped(small, encoder, mode, buffer, epochs):
    how = {"shuffle_buffer": buffer, "epochs": epochs, "seed": 3}
    whole = [comparable(sample) for sample in stream(small, encoder, mode, **how)]
    cuts = list(stream(small, encoder, mode, **how))
    for place, sample in enumerate(cuts):
        again = stream(small, encoder, mode, **how)
        again.start = kept(sample.after)
        rest = [comparable(later) for later in again]
        assert rest == whole[place + 1 :], (place, sample.after)


def test_each_pass_has_every_document_once_in_an_order_of_its_own(small, encoder):
    how = {"shuffle_buffer": 8, "epochs": 3}
    made = list(stream(small, encoder, "truncate", **how, seed=1))
    orders = [[sample.document.sha1 for sample in made if sample.document.here.epoch == epoch] for epoch in range(3)]
    assert [len(order) for order in orders] == [23, 23, 23]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert len({tuple(order) for order in orders}) == 3
    assert len(set(orders[0])) == 23
    other_seed = [sample.document.sha1 for sample in stream(small, encoder, "truncate", **how, seed=2)]
    assert other_seed[:23] != orders[0] and sorted(other_seed[:23]) == sorted(orders[0])
    in_order = [sample.document.sha1 for sample in stream(small, encoder, "truncate")]
    # Records 0 to 7 are one block, and so on: a shuffle moves nothing further.
    assert sorted(orders[0][:8]) == sorted(in_order[:8]) and orders[0] != in_order


def test_the_order_is_the_same_on_every_machine_and_version():
    # From sha256sum, in a shell: it must never change, or a resumed run would read other documents.
    assert passes.permutation(10, seed=42, epoch=0, block=0) == EXPECTED
    assert sorted(passes.permutation(1000, 1, 2, 3)) == list(range(1000))
    firsts = [passes.permutation(4, seed, 0, 0).index(0) for seed in range(2000)]
    assert all(400 < firsts.count(place) < 600 for place in range(4))


EXPECTED = [2, 0, 6, 5, 4, 9, 1, 3, 7, 8]


def test_no_global_random_number_is_drawn(small, encoder):
    random.seed(5)
    before = random.getstate()
    assert list(stream(small, encoder, "truncate", shuffle_buffer=5, epochs=2, read_ahead=4))
    assert random.getstate() == before


def test_a_resume_reads_at_most_one_block_again(tmp_path, encoder, monkeypatch):
    for number in range(6):
        write_records(tmp_path / f"{number}.jsonl", make_records(10, seed=number))
    how = {"shuffle_buffer": 10}
    made = list(stream(tmp_path, encoder, "truncate", **how))
    again = stream(tmp_path, encoder, "truncate", **how)
    again.start = made[44].after
    opened = []
    from slimpajama_hf.corpus import shards

    real = shards.open_raw
    monkeypatch.setattr(shards, "open_raw", lambda url, patience: opened.append(url[-7]) or real(url))
    assert [sample.document for sample in again] == [sample.document for sample in made[45:]]
    assert opened == ["4", "5"]


def test_another_buffer_at_a_resume_loses_and_repeats_nothing(small, encoder):
    def tokens(samples):
        found = {}
        for sample in samples:
            found.setdefault(sample.document.sha1, []).extend(sample.input_ids)
        return found

    whole = list(stream(small, encoder, "window"))
    for before, after in ((0, 6), (6, 0), (6, 4)):
        made = list(stream(small, encoder, "window", shuffle_buffer=before))
        for place in range(0, len(made), 5):
            again = stream(small, encoder, "window", shuffle_buffer=after)
            again.start = kept(made[place].after)
            assert tokens([*made[: place + 1], *again]) == tokens(whole)


def test_a_cursor_of_an_older_version_still_loads(small, encoder):
    whole = list(stream(small, encoder, "truncate"))
    again = stream(small, encoder, "truncate")
    again.start = Cursor(**{"epoch": 0, "shard": "1.jsonl.zst", "row": 4, "token": 0})
    assert [sample.document for sample in again] == [
        sample.document for sample in whole if (sample.document.shard, sample.document.row) >= ("1.jsonl.zst", 4)
    ]


def test_blocks_of_packing_do_not_reach_over_the_end_of_a_pass(small, encoder):
    once = [sample.input_ids for sample in stream(small, encoder, "pack")]
    twice = [sample.input_ids for sample in stream(small, encoder, "pack", epochs=2)]
    assert twice == once + once


def test_a_block_that_cannot_be_read_again_is_an_error_and_not_another_order(tmp_path, encoder):
    for number in range(2):
        write_records(tmp_path / f"{number}.jsonl", make_records(10, seed=number))
    made = list(stream(tmp_path, encoder, "truncate", shuffle_buffer=20))
    write_records(tmp_path / "1.jsonl", make_records(3, seed=1))
    again = stream(tmp_path, encoder, "truncate", shuffle_buffer=20)
    again.start = made[4].after
    with pytest.raises(UserError, match="cannot be read again"):
        list(again)
