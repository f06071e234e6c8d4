"""How a loader, made by PyTorch or by accelerate, takes samples from a stream."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from slimpajama_hf.anywhere.exact_stream import ExactStream, stream_of
from slimpajama_hf.errors import UserError


@dataclasses.dataclass(frozen=True)
class Handing:
    """How many samples of the stream are taken at a time, in its order."""

    samples: int
    """By all processes together, when each takes one batch."""
    block: int
    """By one worker of the loader, before the next worker's turn."""
    workers: int
    batch: int
    """Samples in the batch of one process."""


def processes() -> tuple[int, int]:
    """(rank, number) of the processes that train together."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def of_loader(loader: Any, stream: ExactStream) -> Handing:
    """How `loader` takes samples from `stream`. Raises UserError if that cannot be followed exactly."""
    from accelerate.data_loader import DataLoaderDispatcher, IterableDatasetShard

    _refuse(loader, stream)
    batch, inner = loader.batch_size or 1, loader.dataset
    if type(loader) is DataLoaderDispatcher:
        world = loader.state.num_processes
        # The first process reads and shares out.
        whole = batch if loader.split_batches else batch * world
        return Handing(whole, batch, loader.num_workers, whole // world)
    if isinstance(inner, IterableDatasetShard):
        # Each process reads everything and keeps its share.
        whole = inner.batch_size if inner.split_batches else inner.batch_size * inner.num_processes
        return Handing(whole, whole, loader.num_workers, whole // inner.num_processes)
    whole = batch * stream.world_size
    return Handing(whole, whole, loader.num_workers, batch)


def _refuse(loader: Any, stream: ExactStream) -> None:
    from accelerate.data_loader import DataLoaderDispatcher, IterableDatasetShard

    _, world = processes()
    shared_by_accelerate = type(loader) is DataLoaderDispatcher or isinstance(loader.dataset, IterableDatasetShard)
    if stream_of(loader.dataset) is not stream:
        raise UserError(
            "RunRecord was given a stream that this loader does not read; give the same ExactStream to both (for a "
            "Trainer as train_dataset)"
        )
    if not getattr(loader, "in_order", True):
        raise UserError(
            "the workers of this loader may give their batches in any order (in_order=False), so that what was read "
            "cannot be told from how much was read; leave in_order (of a Trainer dataloader_in_order) True"
        )
    if loader.num_workers > 1 and not isinstance(loader.dataset, ExactStream | IterableDatasetShard):
        raise UserError(
            f"{loader.num_workers} workers, and a datasets.IterableDataset of one shard, which one of them alone would "
            "read; use 0 workers or 1, or give the ExactStream itself"
        )
    state = getattr(loader, "state", None)
    prepared_for = getattr(state if state is not None else loader.dataset, "num_processes", world)
    if shared_by_accelerate and prepared_for != world:
        raise UserError(
            f"{world} processes, and accelerate shares out for {prepared_for}, so that each would read every document; "
            "start them with accelerate launch (on a CPU: --cpu, or Accelerator(cpu=True))"
        )
    if world > 1 and not shared_by_accelerate and stream.world_size != world:
        raise UserError(
            f"{world} processes, and each would read every document; prepare the loader with accelerate, or say "
            "ExactStream(..., rank=RANK, world_size=WORLD_SIZE)"
        )
    if stream.world_size > 1 and shared_by_accelerate and world > 1:
        raise UserError(
            f"ExactStream(world_size={stream.world_size}) shares out its samples, and accelerate would share out "
            "those; leave rank and world_size away"
        )


def keep_to_its_own_numbers(loader: Any) -> None:
    """Give a loader a generator of its own. It draws a seed for its workers whenever it begins. Drawn from the global
    generator, that would change dropout after every resume."""
    loader = getattr(loader, "base_dataloader", loader)
    if getattr(loader, "generator", None) is None:
        loader.generator = torch.Generator()
