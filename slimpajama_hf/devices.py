"""Which device the run may use, and what its processor can do."""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import sys
from pathlib import Path
from typing import Any

from slimpajama_hf import loading, screen
from slimpajama_hf.errors import UsageError, UserError


def is_distributed() -> bool:
    """Whether a launcher started several processes; it then assigns the devices."""
    # What is no number is refused by `prepare_processes`, in a sentence that has to come out here too.
    size = os.environ.get("WORLD_SIZE", "1").strip()
    return size.isdecimal() and int(size) > 1


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


_YES = ("1", "true", "yes", "on", "y", "t")

#: What launchers number their processes with; torch, accelerate and transformers take each for a whole number.
LAUNCHER_NUMBERS = (
    "WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT",
    "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE",
)  # fmt: skip


def prepare_processes() -> None:
    """What has to be set before torch is imported, and have accelerate join the processes of a launcher over CPUs where
    there is no GPU; before anything asks it. Raises UserError for a launcher's variables that cannot be understood.

    It takes them for one each otherwise (accelerate state.py, `_prepare_backend`: a CPU only where it was asked for).
    """
    _check_launcher()
    wait_politely()
    take_huge_pages()
    if not is_distributed():
        return
    import torch

    if not torch.cuda.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"


def prepare(gpu: int | None, use_cpu: bool) -> None:
    """All that has to be settled before the flags are parsed: `prepare_processes`, then `choose_gpu`."""
    prepare_processes()
    choose_gpu(gpu, use_cpu)


def _check_launcher() -> None:
    for name in LAUNCHER_NUMBERS:
        value = os.environ.get(name)
        if value is None:
            continue
        try:
            int(value)
        except ValueError:
            raise UserError(
                f"{name}={value} (an environment variable): expected a whole number, as a launcher sets it; "
                f"unset {name} to train in one process"
            ) from None
    value = os.environ.get("ACCELERATE_USE_CPU", "false")
    if value.lower() not in (*_YES, "0", "false", "no", "off", "n", "f"):
        raise UserError(f"ACCELERATE_USE_CPU={value} (an environment variable): expected true or false")
    value = os.environ.get("LOCAL_RANK", "-1")
    if int(value) >= 0 and "WORLD_SIZE" not in os.environ:
        raise UserError(
            f"LOCAL_RANK={value} (an environment variable) without WORLD_SIZE: several processes are started by "
            "accelerate launch or torchrun; unset LOCAL_RANK to train in one"
        )
    if not is_distributed():
        return
    size, rank = int(os.environ["WORLD_SIZE"]), os.environ.get("RANK")
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"WORLD_SIZE={size} (an environment variable) without {', '.join(missing)}: several processes are started "
            "by accelerate launch or torchrun; unset WORLD_SIZE to train in one"
        )
    if rank is not None and not 0 <= int(rank) < size:
        raise UserError(f"RANK={rank} (an environment variable): expected 0 to {size - 1}, for WORLD_SIZE={size}")


#: What the CUDA driver reads, once, when it is woken: the GPUs that a process sees.
VISIBLE = "CUDA_VISIBLE_DEVICES"

#: The GPU that this process computes on, as `--gpu` would name it, once CUDA is awake.
_chosen: int | None = None


def choose_gpu(gpu: int | None, use_cpu: bool = False) -> None:
    """Leave only GPU `gpu` visible (None: GPU 0 if there is any), and wake CUDA to it. Raises UserError for one that is
    not there. Numbers are those of the GPUs that the user left visible.

    Called before anything else may wake CUDA, as making `TrainingArguments` does: CUDA_VISIBLE_DEVICES is read once. So
    it is set first, without asking what there is (NVML knows without waking CUDA, but is not everywhere), and what came
    of it is looked at afterwards.

    Without this a single process on a machine with several GPUs becomes `nn.DataParallel` with a batch of several
    documents (`TrainingArguments.train_batch_size`).
    """
    if is_distributed():
        if gpu is not None:
            raise UserError(f"--gpu {gpu}: with several processes the launcher assigns the GPUs; leave --gpu out")
        return
    if gpu is not None and use_cpu:
        raise UserError(f"--gpu {gpu}, --use_cpu: one or the other; leave one of them out")
    if gpu is not None and gpu < 0:
        raise UserError(f"--gpu {gpu}: expected the number of a GPU, 0 or more")
    if launcher_asks_for_cpu():
        if gpu:
            raise UserError(
                f"--gpu {gpu}: the launcher asks for the CPU (ACCELERATE_USE_CPU); leave one of the two out"
            )
        # accelerate obeys it, but `TrainingArguments.device` names a GPU that is there all the same.
        os.environ[VISIBLE] = ""
        return
    if use_cpu:
        return
    global _chosen
    with loading.libraries("torch"):
        import torch

    number = gpu or 0
    if torch.cuda.is_initialized():
        if _chosen is not None and _chosen != number:
            raise UserError(
                f"--gpu {number}: an earlier run in this process took GPU {_chosen}, and CUDA shows it no other; "
                "start a new process"
            )
        if _chosen is None and number:
            raise _awake(number)
        return
    visible = os.environ.get(VISIBLE)
    names = _names(visible)
    if names is not None and number >= len(names):
        if number:
            shown = f"{len(names)} GPU{'s' * (len(names) > 1)}" if names else "no GPU"
            raise UserError(f"--gpu {gpu}: {VISIBLE}={visible} shows {shown}; {_instead(len(names))}")
        return
    os.environ[VISIBLE] = str(number) if names is None else names[number]
    if torch.cuda.is_available():
        # Awake now, and counted by the driver itself from here on.
        torch.cuda.init()
        if torch.cuda.device_count() == 1:
            _chosen = number
            return
    available = torch.cuda.is_initialized()
    if visible is None:
        del os.environ[VISIBLE]
    else:
        os.environ[VISIBLE] = visible
    if available:
        # Somebody had woken it before, to several: the first of them is this one.
        if number:
            raise _awake(number)
        return
    _refuse_gpu_that_is_not_there(gpu, visible)


def _names(visible: str | None) -> list[str] | None:
    """The GPUs of a CUDA_VISIBLE_DEVICES, up to the first that is none; None: all that there are."""
    if visible is None:
        return None
    names = [name.strip() for name in visible.split(",")]
    return list(itertools.takewhile(lambda name: name and not name.startswith("-"), names))


def _instead(count: int) -> str:
    if count > 1:
        return f"name one of 0 to {count - 1}"
    return "leave --gpu out to train on GPU 0" if count else "leave --gpu out to train on the CPU"


def _awake(gpu: int) -> UserError:
    return UserError(
        f"--gpu {gpu}: CUDA was in use in this process before the run, and shows it no other GPU than the first; start "
        f"a new process (a notebook: restart its kernel), or set {VISIBLE}={gpu} before CUDA is used"
    )


def _refuse_gpu_that_is_not_there(gpu: int | None, visible: str | None) -> None:
    """After CUDA found none where GPU `gpu` was left visible alone: raise UserError, unless there is none at all."""
    import torch

    # NVML's word where there is NVML, else that of the driver, which is awake by now and saw nothing.
    there = torch.cuda.device_count()
    if there > (gpu or 0):
        name = torch.version.cuda or "the GPU"
        fault = f"PyTorch cannot use it (its CUDA is {name}; nvidia-smi says which one the driver has)"
        if gpu is not None:
            raise UserError(f"--gpu {gpu}: it is there, but {fault}; mend that, or leave --gpu out to train on the CPU")
        screen.say(f"there is a GPU here, but {fault}; training on the CPU")
    elif gpu:
        if visible is not None:
            raise UserError(f"--gpu {gpu}: {VISIBLE}={visible} names a GPU that is not there; mend or unset it")
        found = {0: f"there is no GPU {gpu} here", 1: "there is GPU 0 only"}
        if not torch.backends.cuda.is_built():
            found[0] = "there is no GPU here, or this PyTorch is built without CUDA"
        said = found.get(there, f"there are GPUs 0 to {there - 1}")
        raise UserError(f"--gpu {gpu}: {said}; {_instead(there)}")


def launcher_asks_for_cpu() -> bool:
    """Whether `accelerate launch` was told to use no GPU."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in _YES


def use_one_gpu(training: Any, gpu: int | None) -> None:
    """Of the flags as parsed (`TrainingArguments`): no `DataParallel`, and the word that `--gpu 0` found no GPU."""
    if is_distributed():
        return
    if training.n_gpu > 1:
        # CUDA was awake before this run and shows several: `cuda:0` is the one.
        training._n_gpu = 1
    if gpu is not None and training.device.type != "cuda":
        why = (
            "the launcher asks for the CPU (ACCELERATE_USE_CPU)" if launcher_asks_for_cpu() else "there is no GPU here"
        )
        name = "the CPU" if training.device.type == "cpu" else training.device.type
        if name != "the CPU":
            why = "there is no CUDA GPU here"
        screen.say(f"--gpu {gpu}: {why}; training on {name}")


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
