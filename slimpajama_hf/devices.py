"""Which device the run may use. Chosen before CUDA wakes up, so that accelerate sees that one only."""

from __future__ import annotations

import os

from slimpajama_hf.errors import UserError


def is_distributed() -> bool:
    """Whether a launcher started several processes; it then assigns the devices."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def choose_gpu(gpu: int | None) -> None:
    """Leave only GPU `gpu` visible (None: GPU 0 if there is any). Raises UserError for one that is not there.

    Without this a single process on a machine with several GPUs becomes `nn.DataParallel` with a batch of several
    documents (transformers training_args.py, 5.23, line 1820).
    """
    if is_distributed():
        if gpu is not None:
            raise UserError(f"--gpu {gpu}: with several processes the launcher assigns the GPUs; leave --gpu out")
        return
    import torch

    count = torch.cuda.device_count()
    if gpu is not None and not 0 <= gpu < count:
        there = (
            f"there are GPUs 0 to {count - 1}"
            if count > 1
            else "there is GPU 0 only"
            if count
            else "there is no GPU here"
        )
        raise UserError(
            f"--gpu {gpu}: {there}; " + ("name one of them" if count else "leave --gpu out to train on the CPU")
        )
    if count > 1 or gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(number) for number in range(count)]
        os.environ["CUDA_VISIBLE_DEVICES"] = names[gpu or 0]
