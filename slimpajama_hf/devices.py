"""Which device the run may use, and what its processor can do."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from pathlib import Path

from slimpajama_hf.errors import UsageError, UserError


def is_distributed() -> bool:
    """Whether a launcher started several processes; it then assigns the devices."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_sharded() -> bool:
    """Whether a launcher asked for FSDP: each process then holds a part of the model."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")


def launcher_compiles() -> bool:
    """Whether a launcher asked for torch.compile (`accelerate launch --dynamo_backend`)."""
    return os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() not in ("", "no")


def refuse_launchers_wishes() -> None:
    """Raise UsageError for what a launcher asked for in the environment and this program does not do."""
    for variable, name in (
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism_config"),
    ):
        if os.environ.get(variable, "").lower() in ("1", "true"):
            raise UsageError(
                f"the launcher asks for {name}, which is not supported; start it with one of configs/accelerate/"
            )
    if is_sharded() and not is_distributed():
        raise UsageError(
            "the launcher asks for FSDP and started one process, which has nothing to shard; add --num_processes 2 or "
            "more, or leave FSDP out"
        )


def prepare_processes() -> None:
    """Have accelerate join the processes of a launcher over CPUs where there is no GPU; before anything asks it.

    It takes them for one each otherwise (accelerate state.py, `_prepare_backend`: a CPU only where it was asked for).
    """
    if not is_distributed():
        return
    import torch

    if not torch.cuda.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"


def choose_gpu(gpu: int | None) -> None:
    """Leave only GPU `gpu` visible (None: GPU 0 if there is any). Raises UserError for one that is not there.

    Called before CUDA wakes up, so that accelerate sees that one only.

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


def wait_politely() -> None:
    """Have the threads of one step sleep soon instead of spinning when they wait for each other.

    libgomp's threads spin for milliseconds by default. On a machine that does anything else beside, the one that was
    put aside is then kept off by the one that waits for it: a step takes 3 to 6 times as long. After 1,000 spins (some
    microseconds) asleep, it is half as bad, and nothing is lost when the machine is quiet. Must come before torch is
    imported; what the user has set stays (GOMP_SPINCOUNT, OMP_WAIT_POLICY: libgomp manual, "Environment Variables").
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def take_huge_pages() -> None:
    """Have PyTorch ask for pages of 2 MB where the kernel has them (c10/core/impl/alloc_cpu.cpp: THP_MEM_ALLOC_ENABLE).

    Weights, gradients and moments are then faulted in 512 times less often: the first steps of the 124M model take half
    as long as with pages of 4 KB. Must come before torch is imported; what the user has set stays.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed for the next step instead of giving it back; False where it cannot.

    A step frees and asks again for hundreds of megabytes; every page of them is then faulted in and zeroed by the
    kernel, which takes longer than the arithmetic on it. glibc only (malloc/malloc.h: M_TRIM_THRESHOLD,
    M_MMAP_THRESHOLD, M_MMAP_MAX). Peak memory is the same; it just stays.
    """
    if sys.platform != "linux":
        return False
    import ctypes

    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        # Old versions refuse so high a threshold; then nothing is mapped at all, which is the same for us.
        return bool(
            library.mallopt(trim_threshold, 2**31 - 1)
            and (library.mallopt(mmap_threshold, 2**30) or library.mallopt(mmap_max, 0))
        )
    return False


def peak_memory() -> dict[str, int]:
    """Most bytes that this process has held so far, and that PyTorch has held on a GPU (0 without one)."""
    import resource

    import torch

    # Kilobytes on Linux, bytes on macOS (getrusage).
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "device_bytes": torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0,
    }


def has_fast_bfloat16() -> bool:
    """Whether this processor multiplies in bfloat16 in hardware (AVX512-BF16 or AMX; Linux on x86).

    Elsewhere it is emulated, which is a hundred times slower than float32.
    """
    import torch

    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def is_amd() -> bool:
    """Whether this is an AMD processor (Linux or Windows on x86)."""
    with contextlib.suppress(OSError):
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    return "AuthenticAMD" in platform.processor()
