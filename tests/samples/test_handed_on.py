"""In window and pack one process of a machine reads and tokenizes, and the others take what it makes."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import AuthenticationError

import pytest

from slimpajama_hf.corpus import opening
from slimpajama_hf.corpus.documents import Cursor
from slimpajama_hf.errors import UserError
from slimpajama_hf.samples.handed_on import Machine
from slimpajama_hf.samples.stream import SampleStream
from tests.conftest import make_text, write_records
from tests.samples.test_shared_samples import read


class Nothing:
    """Stands in for what the others must not use: corpus and tokenizer."""

    mirror = name = "none"

    def __getattr__(self, name):
        raise AssertionError(f"asked for {name}")


def machine_of(shards, encoder, mode, ranks, world_size, groups=None, start=None, **more):
    """What each of the processes `ranks` of one machine reads, all at once; errors in the place of samples."""
    corpus = opening.open_corpus(f"{shards}/*")
    first = Machine(ranks)

    def learn(rank):
        own = rank == ranks[0]
        machine = first if own else Machine(ranks, first.place)
        stream = SampleStream(
            corpus if own else Nothing(), encoder if own else Nothing(), mode, 64, world_size, rank, machine=machine,
            start=start or Cursor(), **more,
        )  # fmt: skip
        found = []
        try:
            for sample in stream:
                found.append(sample)
                if len(found) == groups:
                    break
        except UserError as error:
            assert stream.error is error
            found.append(str(error))
        return found, stream

    with ThreadPoolExecutor(len(ranks)) as pool:
        found = list(pool.map(learn, ranks))
    assert not os.path.exists(os.path.dirname(first.place[0])), "nothing is left of the socket"
    return found


def what_counts(sample):
    of = sample.document
    return (
        sample.input_ids, of.shard, of.row, of.sha1, of.domain, sample.part, sample.after, sample.skipped, sample.gaps,
        sample.text_bytes, sample.tokens_cut, sample.documents, sample.only_fills, sample.rank,
    )  # fmt: skip


@pytest.mark.parametrize("more", [{}, {"shuffle_buffer": 7, "seed": 3, "epochs": 2}], ids=["in order", "shuffled"])
@pytest.mark.parametrize("mode", ["window", "pack"])
def test_the_others_have_what_they_would_have_read(shards, encoder, mode, more):
    alone = read(shards, encoder, mode, 5, **more)
    # Two machines of one run, with 3 and 2 processes: each has a first one of its own.
    for ranks in (range(3), range(3, 5)):
        for rank, (found, stream) in zip(ranks, machine_of(shards, encoder, mode, ranks, 5, **more), strict=True):
            assert [what_counts(sample) for sample in found] == [what_counts(step[rank]) for step in alone]
            assert all(bool(sample.document.text) == (rank == ranks[0]) for sample in found if not sample.only_fills)
            assert stream.error is None and stream.skipped_at_end == {}
            assert [len(sample.together) for sample in found] == [len(step[rank].together) for step in alone]


@pytest.mark.parametrize("mode", ["window", "pack"])
def test_it_goes_on_where_it_stopped(shards, encoder, mode):
    alone = read(shards, encoder, mode, 2)
    # All stop at step 5, with more on the way.
    begun = machine_of(shards, encoder, mode, range(2), 2, groups=5)
    after = begun[1][0][-1].after
    gone_on = machine_of(shards, encoder, mode, range(2), 2, start=after)
    for rank in range(2):
        found = begun[rank][0] + gone_on[rank][0]
        assert [what_counts(sample) for sample in found] == [what_counts(step[rank]) for step in alone]


def test_all_meet_the_same_error_in_the_same_place(tmp_path, encoder):
    texts = [{"text": make_text(n, 40)} for n in range(9)]
    write_records(tmp_path / "a.jsonl.zst", [*texts, *({"text": ""} for _ in range(1200))])
    found = machine_of(tmp_path, encoder, "pack", range(2), 2)
    assert len(found[0][0]) == len(found[1][0]) > 2
    assert found[0][0][-1] == found[1][0][-1] and "1,000 records in a row are unusable" in found[0][0][-1]


def test_one_that_reads_for_others_and_is_gone_is_a_sentence():
    first = Machine(range(4, 6))
    taking = Machine(range(4, 6), first.place).taken(5)

    def end():
        with first.others():
            pass

    thread = threading.Thread(target=end)
    thread.start()
    with pytest.raises(UserError, match="process 4, which reads for process 5, ended or no longer answers"):
        list(taking)
    thread.join()


def test_nobody_else_may_listen():
    first = Machine(range(2))
    address, _ = first.place
    guess = Machine(range(2), (address, b"guessed"))

    def listen():
        with pytest.raises(AuthenticationError):
            first._listener.accept()

    thread = threading.Thread(target=listen)
    thread.start()
    with pytest.raises(AuthenticationError, match="digest"):
        list(guess.taken(1))
    thread.join()
