"""N processes read disjoint samples, none lost and none twice, and another number of processes goes on exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from slimpajama_hf.corpus import opening
from slimpajama_hf.corpus.documents import Cursor
from slimpajama_hf.samples.encoder import Encoder
from slimpajama_hf.samples.stream import SHORT_TEXT_CHARACTERS, SampleStream
from tests.conftest import a_token_for_each_word, make_text, write_records

if TYPE_CHECKING:
    from slimpajama_hf.samples.sample import Sample


MODES = ("truncate", "window", "pack")


def read(shards, encoder, mode, world_size=1, accumulated=1, start=None, groups=None, **more) -> list[list[Sample]]:
    """The samples of each step, in the order of the stream; each rank reads for itself."""
    corpus = opening.open_corpus(f"{shards}/*")
    ranks = []
    for rank in range(world_size):
        stream = SampleStream(
            corpus, encoder, mode, 64, world_size, rank, read_ahead=0, accumulated=accumulated, **more
        )
        stream.start = start or Cursor()
        own = list(stream)
        ranks.append([own[first : first + accumulated] for first in range(0, len(own), accumulated)])
    assert len({len(steps) for steps in ranks}) == 1
    return [[samples[turn] for turn in range(accumulated) for samples in step] for step in zip(*ranks, strict=True)][
        :groups
    ]


def names(samples) -> list[tuple]:
    return [(s.document.shard, s.document.row, s.part, tuple(s.input_ids)) for s in samples]


def flat(steps) -> list[Sample]:
    """What is learned."""
    return [sample for step in steps for sample in step if not sample.only_fills]


def places(samples) -> list[tuple]:
    return [(s.document.shard, s.document.row, s.part) for s in samples]


@pytest.mark.parametrize("more", [{}, {"shuffle_buffer": 7, "seed": 3, "epochs": 2}], ids=["in order", "shuffled"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("world_size", "accumulated"), [(2, 1), (3, 1), (7, 1), (1, 4), (2, 3)])
def test_all_ranks_together_read_what_one_process_reads(shards, encoder, mode, world_size, accumulated, more):
    single = flat(read(shards, encoder, mode, **more))
    steps = read(shards, encoder, mode, world_size, accumulated, **more)
    size = world_size * accumulated
    assert names(flat(steps)) == names(single)
    for number, step in enumerate(steps):
        here = single[number * size : (number + 1) * size]
        assert len(step) == size
        assert {sample.after for sample in step} == {here[-1].after}
        for place, sample in enumerate(step):
            assert sample.rank == place % world_size
            assert places(sample.together) == (places(here) if sample.rank == 0 else [])


@pytest.mark.parametrize("more", [{}, {"shuffle_buffer": 7, "seed": 3}], ids=["in order", "shuffled"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("before", "then"), [(3, 2), (2, 3), (2, 1), (1, 4), (2, 2)])
def test_another_number_of_processes_goes_on_with_the_next_sample(shards, encoder, mode, before, then, more):
    single = flat(read(shards, encoder, mode, **more))
    first = read(shards, encoder, mode, before, groups=5, **more)
    second = read(shards, encoder, mode, then, start=first[-1][0].after, **more)
    assert names(flat(first) + flat(second)) == names(single)


@pytest.mark.parametrize("rank", [0, 1])
def test_what_was_passed_over_is_told_to_every_rank_and_once(tmp_path, encoder, rank):
    texts = ["", make_text(1, 30), "", make_text(2, 30), make_text(3, 30), "", make_text(4, 30)]
    write_records(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    corpus = opening.open_corpus(str(tmp_path / "a.jsonl"))
    made = list(SampleStream(corpus, encoder, "truncate", 64, 2, rank))
    assert [sum(sample.skipped.values()) for sample in made] == [2, 1]


@pytest.fixture(scope="module")
def words() -> Encoder:
    """A tokenizer to which any text without a space is one token."""
    return Encoder(a_token_for_each_word())


ONE_WORD = "x" * (SHORT_TEXT_CHARACTERS + 1)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_long_text_of_one_token_takes_an_empty_place_unless_it_opens_a_step(tmp_path, words, world_size):
    texts = ["a b c", ONE_WORD, "d e", ONE_WORD, ONE_WORD, "short", "f g", "h i", ONE_WORD, "j k"]
    write_records(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    steps = read(tmp_path, words, "truncate", world_size)
    learned = flat(steps)
    assert [sample.document.row for sample in learned] == [0, 2, 6, 7, 9]
    # What is short and what opens a step is passed over as one process does it; the others stand in their places.
    late = sum(
        len(step[0].together) - sum(not sample.only_fills for sample in step) for step in steps if world_size > 1
    )
    passed_over = sum(sum(step[0].skipped.values()) for step in steps)
    assert passed_over + late == 5 and (late > 0) == (world_size > 1)
    assert not any(step[0].only_fills for step in steps)
    # A run of an older version passes all of them over.
    before = read(tmp_path, words, "truncate", world_size, short_text_characters=None)
    assert names(flat(before)) == names(learned)
    assert sum(step[0].skipped["fewer than 2 tokens"] for step in before if step[0].skipped) == 5


@pytest.mark.parametrize("rank", [0, 5])
def test_a_process_tokenizes_its_own_documents_alone(shards, encoder, rank, monkeypatch):
    lengths = []
    opening_of = Encoder.opening
    monkeypatch.setattr(
        Encoder, "opening", lambda self, text, most: lengths.append(most) or opening_of(self, text, most)
    )
    made = list(SampleStream(opening.open_corpus(f"{shards}/*"), encoder, "truncate", 64, 10, rank, read_ahead=0))
    short = sum(len(d.text) <= SHORT_TEXT_CHARACTERS for d in opening.open_corpus(f"{shards}/*").records(Cursor()))
    assert lengths.count(64) == len(made) == 9
    assert len(lengths) <= 9 + 9 + short < 60
