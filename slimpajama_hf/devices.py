"""Choose the device of the run, and set up its processor and memory."""

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
    # `prepare_processes` refuses a WORLD_SIZE that is not a number. This is called before that, and must not fail.
    size = os.environ.get("WORLD_SIZE", "1").strip()
    return size.isdecimal() and int(size) > 1


def is_sharded() -> bool:
    """Whether a launcher asked for FSDP: each process then holds a part of the model."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")


def launcher_compiles() -> bool:
    """Whether a launcher asked for torch.compile (`accelerate launch --dynamo_backend`)."""
    return os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() not in ("", "no")


def refuse_launchers_wishes() -> None:
    """Raise UsageError if the launcher asked, in the environment, for something that this program does not support."""
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

#: Variables that launchers set. torch, accelerate and transformers parse each as a whole number.
LAUNCHER_NUMBERS = (
    "WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT",
    "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE",
)  # fmt: skip


def prepare_processes() -> None:
    """Set what must be set before torch is imported. Raises UserError for launcher variables that make no sense.

    Several processes without a GPU shall train together on CPUs. accelerate connects them only if a CPU was asked for
    (state.py, `_prepare_backend`); otherwise it treats each as a run of its own. So a CPU is asked for here, before
    accelerate reads the variable.
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
    """Do what must come before the flags are parsed: `prepare_processes`, then `choose_gpu`."""
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


#: The GPUs that a process sees. The CUDA driver reads this variable once, when it is initialized.
VISIBLE = "CUDA_VISIBLE_DEVICES"

#: The GPU that this process uses, counted as `--gpu` counts; None before CUDA is initialized.
_chosen: int | None = None


def choose_gpu(gpu: int | None, use_cpu: bool = False) -> None:
    """Make only GPU `gpu` visible (None: GPU 0 if there is any) and wake CUDA. Raises UserError if it is not there.

    `gpu` counts the GPUs that the user left visible. CUDA_VISIBLE_DEVICES is read only once, so this must come before
    anything initializes CUDA, as making `TrainingArguments` does. The variable is set first and the result is checked
    afterwards: NVML can tell beforehand which GPUs there are, but is not installed everywhere.

    Without this, one process on a machine with several GPUs would use `nn.DataParallel`, with a batch of several
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
        # accelerate obeys the launcher, but `TrainingArguments.device` would still name a GPU that is visible.
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
        # From here on CUDA is initialized, and the driver itself counts the GPUs.
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
        # CUDA was initialized earlier and sees several GPUs: the first of them is used.
        if number:
            raise _awake(number)
        return
    _refuse_gpu_that_is_not_there(gpu, visible)


def _names(visible: str | None) -> list[str] | None:
    """The GPUs that a value of CUDA_VISIBLE_DEVICES lists, up to the first invalid entry. None: it is not set."""
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
    """CUDA did not find GPU `gpu`: raise UserError with the reason, unless the run may use the CPU instead."""
    import torch

    # NVML counts the GPUs if it is installed; else the driver does, which is initialized by now and saw none.
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
    """Turn `DataParallel` off in the parsed `TrainingArguments`, and say so if `--gpu 0` found no GPU."""
    if is_distributed():
        return
    if training.n_gpu > 1:
        # CUDA was initialized before this run and sees several GPUs: use `cuda:0`.
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
    """Make threads that wait for each other within a step sleep soon instead of spinning.

    libgomp's threads spin for milliseconds by default. On a machine that does anything else, a spinning thread keeps
    the thread that it waits for off the core: a step takes 3 to 6 times as long. Sleeping after 1,000 spins (some
    microseconds) halves that, and costs nothing on a quiet machine. Must come before torch is imported. Values that the
    user has set stay (GOMP_SPINCOUNT, OMP_WAIT_POLICY: libgomp manual, "Environment Variables").
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def take_huge_pages() -> None:
    """Have PyTorch ask for pages of 2 MB where the kernel has them (c10/core/impl/alloc_cpu.cpp: THP_MEM_ALLOC_ENABLE).

    Weights, gradients and moments then cause 512 times fewer page faults: the first steps of the 124M model take half
    as long as with pages of 4 KB. Must come before torch is imported. A value that the user has set stays.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for the next step instead of returning it. False if it cannot.

    A step frees and allocates hundreds of megabytes. Memory that was returned must be faulted in and zeroed again by
    the kernel, which takes longer than the arithmetic on it. glibc only (malloc/malloc.h: M_TRIM_THRESHOLD,
    M_MMAP_THRESHOLD, M_MMAP_MAX). Peak memory is the same; it is only held longer.
    """
    if sys.platform != "linux":
        return False
    import ctypes

    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        # Old versions refuse such a high threshold. Turning mmap off has the same effect for us.
        return bool(
            library.mallopt(trim_threshold, 2**31 - 1)
            and (library.mallopt(mmap_threshold, 2**30) or library.mallopt(mmap_max, 0))
        )
    return False


def peak_memory() -> dict[str, int]:
    """The most bytes that this process has held so far, and that PyTorch has held on a GPU (0 without one)."""
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
