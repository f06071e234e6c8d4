"""One order of samples, whatever the loader, the workers, the processes; and it goes on where it stopped."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import DataCollatorForLanguageModeling, default_data_collator

from slimpajama_hf import ExactStream
from slimpajama_hf.anywhere import loaders, notes
from slimpajama_hf.errors import UsageError, UserError
from slimpajama_hf.lookback import checks
from tests.anywhere import scripts
from tests.conftest import ROOT, environment, python, read_ledger


def stream_of(texts: str, **settings) -> ExactStream:
    return ExactStream(texts, "builtin", **({"max_length": 64, "shuffle_buffer": 16} | settings))


def ids_of(items) -> list[list[int]]:
    return [list(item["input_ids"]) for item in items]


@pytest.fixture(scope="module")
def order(texts) -> dict[str, list[list[int]]]:
    """The samples of each mode, as one process without workers reads them."""
    return {mode: ids_of(stream_of(texts, mode=mode)) for mode in ("truncate", "window", "pack")}


@pytest.mark.parametrize("mode", ["truncate", "window", "pack"])
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_do_not_change_the_order(texts, order, mode, workers):
    stream = stream_of(texts, mode=mode, batch_size=4)
    loader = DataLoader(stream, batch_size=4, num_workers=workers, collate_fn=ids_of)
    assert list(itertools.chain.from_iterable(loader)) == order[mode]


@pytest.mark.slow
def test_spawned_workers_do_not_change_it_either(texts, order):
    stream = stream_of(texts, batch_size=4)
    loader = DataLoader(stream, batch_size=4, num_workers=2, collate_fn=ids_of, multiprocessing_context="spawn")
    assert list(itertools.islice(itertools.chain.from_iterable(loader), 12)) == order["truncate"][:12]
    with pytest.raises(UserError, match="workers of the loader know how far they are"):
        stream.state_dict()


def test_workers_whose_batches_are_not_known_are_refused(texts):
    with pytest.raises(UserError, match="batch_size=N"):
        list(DataLoader(stream_of(texts), batch_size=4, num_workers=2, collate_fn=ids_of))


@pytest.mark.parametrize("mode", ["truncate", "window", "pack"])
@pytest.mark.parametrize("taken", [1, 7, 33])
def test_the_state_is_the_place_behind_what_was_given_out(texts, order, mode, taken):
    stream = stream_of(texts, mode=mode)
    first = ids_of(itertools.islice(stream, taken))
    other = stream_of(texts, mode=mode)
    other.load_state_dict(stream.state_dict())
    assert first + ids_of(other) == order[mode]
    # As with any dataset, whoever begins once more begins at the beginning.
    assert ids_of(other) == order[mode]


def test_state_dict_where_workers_have_the_iterators_is_refused(texts):
    stream = stream_of(texts, batch_size=4)
    next(iter(DataLoader(stream, batch_size=4, num_workers=2, collate_fn=ids_of)))
    with pytest.raises(UserError, match="num_workers=0"):
        stream.state_dict()


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata's own
@pytest.mark.parametrize("workers", [0, 2])
def test_it_is_stateful_as_torchdata_wants_it(texts, order, workers):
    def loader() -> StatefulDataLoader:
        return StatefulDataLoader(stream_of(texts, batch_size=4), batch_size=4, num_workers=workers, collate_fn=ids_of)

    first = loader()
    begun = list(itertools.chain.from_iterable(itertools.islice(first, 5)))
    second = loader()
    second.load_state_dict(first.state_dict())
    assert begun + list(itertools.chain.from_iterable(second)) == order["truncate"]


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("dispatch", [None, False], ids=["dispatcher", "shard"])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_stateful_loaders_of_accelerate_go_on_with_the_next_batch(texts, order, workers, dispatch):
    """accelerate fetches a batch ahead of the one that it gives out; its state is that of the latter."""
    how = DataLoaderConfiguration(use_stateful_dataloader=True, dispatch_batches=dispatch)
    accelerator = Accelerator(cpu=True, dataloader_config=how)

    def loader():
        stream = stream_of(texts, batch_size=4)
        return accelerator.prepare(DataLoader(stream, batch_size=4, num_workers=workers, collate_fn=stream.collate))

    def ids(batches):
        for batch in batches:
            for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                yield row[mask.bool()].tolist()

    first, begun, state = loader(), [], None
    for batch in itertools.islice(first, 5):
        begun += ids([batch])
        state = first.state_dict()
    second = loader()
    second.load_state_dict(state)
    assert begun + list(ids(second)) == order["truncate"]


def test_a_state_of_something_else_is_refused(texts):
    with pytest.raises(UserError, match=r"not what ExactStream.state_dict\(\) has given"):
        stream_of(texts).load_state_dict({"epoch": 1})


@pytest.mark.parametrize("wrong", [{"mode": "cut"}, {"max_length": 1}, {"rank": 2, "world_size": 2}])
def test_settings_that_cannot_be_are_refused(texts, wrong):
    with pytest.raises(UsageError, match="expected"):
        stream_of(texts, **wrong)


def test_collators_of_others_take_its_items(texts):
    """Those of transformers, and ours, which fills up behind a sample with what is not predicted."""
    stream = stream_of(texts)
    (item,) = itertools.islice(stream, 1)
    assert default_data_collator([item])["labels"].shape == (1, len(item["input_ids"]))
    own = stream_of(texts, labels=False)
    own.tokenizer.pad_token = own.tokenizer.eos_token
    batch = DataCollatorForLanguageModeling(own.tokenizer, mlm=False)(list(itertools.islice(own, 3)))
    assert batch["input_ids"].shape == batch["labels"].shape
    items = list(itertools.islice(stream, 6))
    batch = stream.collate(items)
    for place, item in enumerate(items):
        count = len(item["input_ids"])
        assert batch["input_ids"][place, :count].tolist() == item["input_ids"]
        assert (batch["labels"][place, count:] == -100).all() and batch["attention_mask"][place].sum() == count


def test_processes_share_it_out_among_themselves(texts, order):
    """Of each batch of all its part, together the order of one; with workers too."""
    for workers in (0, 2):
        parts = []
        for rank in range(2):
            stream = stream_of(texts, mode="pack", rank=rank, world_size=2, batch_size=3)
            parts.append(list(DataLoader(stream, batch_size=3, num_workers=workers, collate_fn=ids_of)))
        together = [ids for pair in zip(*parts, strict=False) for batch in pair for ids in batch]
        assert together == order["pack"][: len(together)] and len(together) >= len(order["pack"]) - 6


def test_what_is_noted_of_a_worker_is_there_with_its_batch_and_does_not_grow(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(notes, "NOTES_A_FILE", 5)
    stream = stream_of(texts, mode="window")
    loader = DataLoader(stream, batch_size=3, num_workers=2, collate_fn=ids_of)
    handing = loaders.of_loader(loader, stream)
    stream.track(tmp_path / "notes", handing.workers, handing.block, True)
    for batch in loader:
        taken = stream.take(handing.samples)
        assert [len(sample.input_ids) for sample in taken] == [len(ids) for ids in batch]
    assert len(list((tmp_path / "notes").iterdir())) <= 4
    assert list(stream.samples(stream.cursor)) == []


@pytest.fixture(scope="module")
def alone(tmp_path_factory, texts) -> Path:
    """One process, nobody stops it: 8 steps of 8 samples."""
    run = tmp_path_factory.mktemp("together") / "alone"
    done = python(str(Path(__file__).parent / "train_together.py"), texts, str(run), "8", "dispatch", "0")
    assert done.returncode == 0, done.stderr[-3000:]
    return run


@pytest.mark.slow
@pytest.mark.parametrize(("how", "workers"), [("dispatch", 2), ("shard", 0), ("own", 2)])
def test_several_processes_learn_what_one_learns_and_one_goes_on_with_it(texts, tmp_path, alone, how, workers):
    """Killed after the checkpoint of step 4, two processes are followed by one: each document once, in one order."""
    run, script = tmp_path / "run", str(Path(__file__).parent / "train_together.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    killed = [sys.executable, str(scripts.KILLED), str(run), "rows:6", script]
    command = [*launch, *killed, texts, str(run), "8", how, str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=200)
    assert done.returncode != 0 and (run / "checkpoint-4").is_dir(), done.stderr[-3000:]
    first = read_ledger(run)[:4]
    assert {sample["rank"] for row in first for sample in row["samples"]} == {0, 1}
    done = python(script, texts, str(run), "8", "dispatch", "0")
    assert done.returncode == 0, done.stderr[-3000:]
    assert scripts.documents(run) == scripts.documents(alone)
    losses = [[row["loss"] for row in read_ledger(each)] for each in (run, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    verified = checks.verify(run)
    assert verified.ok, verified.lines


def test_a_loader_that_every_process_would_read_whole_is_refused(texts, monkeypatch):
    monkeypatch.setattr(loaders, "processes", lambda: (0, 2))
    stream = stream_of(texts)
    with pytest.raises(UserError, match="each would read every document"):
        loaders.of_loader(DataLoader(stream, batch_size=2), stream)
    with pytest.raises(UserError, match="a stream that this loader does not read"):
        loaders.of_loader(DataLoader(stream_of(texts), batch_size=2), stream)
    for_one = prepare_data_loader(DataLoader(stream, batch_size=2), put_on_device=True, device=torch.device("cpu"))
    with pytest.raises(UserError, match="accelerate shares out for 1"):
        loaders.of_loader(for_one, stream)
    out_of_order = DataLoader(stream, batch_size=2, num_workers=2, in_order=False)
    with pytest.raises(UserError, match="in_order"):
        loaders.of_loader(out_of_order, stream)


def test_more_than_was_given_out_is_not_taken(texts, tmp_path):
    """What training says that it took is held against what the loader has given out."""
    stream = stream_of(texts)
    stream.track(tmp_path / "notes", 0, 2, True)
    items = iter(stream)
    next(items)
    with pytest.raises(UserError, match="took 3 samples, and the loader has given out 1"):
        stream.take(3)


def test_as_a_dataset_of_datasets_it_gives_the_same(texts, order):
    stream = stream_of(texts)
    assert ids_of(stream.as_datasets()) == order["truncate"]
