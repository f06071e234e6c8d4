"""N processes read disjoint samples, none lost and none twice, and another number of processes goes on exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from slimpajama_hf.corpus import opening
from slimpajama_hf.corpus.documents import Cursor
from slimpajama_hf.samples.stream import SampleStream

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
    """What is learned: what only fills a place has no weight."""
    return [sample for step in steps for sample in step if sample.weight]


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
        assert all(names(sample.together) == names(here) for sample in step)


@pytest.mark.parametrize(("world_size", "accumulated"), [(2, 1), (3, 2)])
def test_weights_make_the_mean_over_a_step_that_over_its_tokens(shards, encoder, world_size, accumulated):
    for step in read(shards, encoder, "truncate", world_size, accumulated):
        real = [sample for sample in step if sample.weight]
        predicted = sum(sample.predicted for sample in real)
        for sample in real:
            assert sample.weight / len(step) == pytest.approx(sample.predicted / predicted)


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
    from tests.conftest import make_text, write_records

    texts = ["", make_text(1, 30), "", make_text(2, 30), make_text(3, 30), "", make_text(4, 30)]
    write_records(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    corpus = opening.open_corpus(str(tmp_path / "a.jsonl"))
    made = list(SampleStream(corpus, encoder, "truncate", 64, 2, rank))
    assert [sum(sample.skipped.values()) for sample in made] == [2, 1]
