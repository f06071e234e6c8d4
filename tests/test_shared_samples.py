"""N processes read disjoint samples, none lost and none twice, and another number of processes goes on exactly."""

from __future__ import annotations

import pytest

from slimpajama_hf import corpora
from slimpajama_hf.corpora import Cursor
from slimpajama_hf.samples import Sample, SampleStream

MODES = ("truncate", "window", "pack")


def read(shards, encoder, mode, world_size=1, start=None, groups=None, **more) -> tuple[list[list[Sample]], int]:
    """(samples of each step in rank order, samples that were too few for a step); each rank reads for itself."""
    corpus = corpora.open_corpus(f"{shards}/*")
    ranks = []
    for rank in range(world_size):
        stream = SampleStream(corpus, encoder, mode, 64, world_size, rank, read_ahead=0, **more)
        stream.start = start or Cursor()
        ranks.append((list(stream), stream.untaken_at_end))
    assert len({(len(samples), untaken) for samples, untaken in ranks}) == 1
    return [list(step) for step in zip(*(samples for samples, _ in ranks), strict=True)][:groups], ranks[0][1]


def names(samples) -> list[tuple]:
    return [(s.document.shard, s.document.row, s.part, tuple(s.input_ids)) for s in samples]


def flat(steps) -> list[Sample]:
    return [sample for step in steps for sample in step]


@pytest.mark.parametrize("more", [{}, {"shuffle_buffer": 7, "seed": 3, "epochs": 2}], ids=["in order", "shuffled"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_all_ranks_together_read_what_one_process_reads(shards, encoder, mode, world_size, more):
    alone, _ = read(shards, encoder, mode, **more)
    steps, untaken = read(shards, encoder, mode, world_size, **more)
    together, single = flat(steps), flat(alone)
    assert untaken == len(single) % world_size
    assert names(together) == names(single)[: len(together)]
    for number, step in enumerate(steps):
        assert {sample.after for sample in step} == {single[(number + 1) * world_size - 1].after}


@pytest.mark.parametrize("more", [{}, {"shuffle_buffer": 7, "seed": 3}], ids=["in order", "shuffled"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("before", "then"), [(3, 2), (2, 3), (2, 1), (1, 4), (2, 2)])
def test_another_number_of_processes_goes_on_with_the_next_sample(shards, encoder, mode, before, then, more):
    single = flat(read(shards, encoder, mode, **more)[0])
    first, _ = read(shards, encoder, mode, before, groups=5, **more)
    second, untaken = read(shards, encoder, mode, then, start=first[-1][0].after, **more)
    assert names(flat(first) + flat(second)) == names(single)[: len(single) - untaken]


def test_one_process_takes_what_was_too_few_for_seven(shards, encoder):
    steps, untaken = read(shards, encoder, "truncate", 7)
    rest, none = read(shards, encoder, "truncate", start=steps[-1][0].after)
    assert (untaken, len(rest), none) == (90 % 7, 90 % 7, 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_what_was_passed_over_is_told_to_every_rank_and_once(tmp_path, encoder, rank):
    from tests.conftest import make_text, write_records

    texts = ["", make_text(1, 30), "", make_text(2, 30), make_text(3, 30), "", make_text(4, 30)]
    write_records(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    corpus = corpora.open_corpus(str(tmp_path / "a.jsonl"))
    made = list(SampleStream(corpus, encoder, "truncate", 64, 2, rank))
    assert [sum(sample.skipped.values()) for sample in made] == [2, 1]
