"""Commands in processes of their own without the 4 seconds that each needs to import torch and transformers.

A server imports the libraries once and forks for every command, as `multiprocessing`'s forkserver does. What a child
then runs is the program itself, from its first line, with its own arguments, environment, folder and output; of ours
nothing is imported before. Where a variable differs that a library reads as it is imported, or that a test is about,
`subprocess` starts a process from scratch.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

#: Variables that are read as libraries are imported, or before anything of ours runs.
READ_EARLY = (
    "HF_", "HUGGINGFACE", "TRANSFORMERS", "OMP_", "MKL_", "OPENBLAS", "GOMP", "THP_", "ACCELERATE", "CUDA", "TORCH",
    "LD_", "MPL", "PYTHON", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER", "USE_", "TOKENIZERS", "GLIBC", "MALLOC",
)  # fmt: skip


def _early(variables: Any) -> dict[str, str]:
    return {k: v for k, v in variables.items() if k.startswith(READ_EARLY) and k != "PYTHONPATH"}


class ForkServer:
    """Starts the server when it is first needed; `run` is `subprocess.run` of `python ARGUMENTS`."""

    def __init__(self, environment: dict[str, str]) -> None:
        # What the program would set before it imports torch (`devices.py`).
        self._environment = environment | {"THP_MEM_ALLOC_ENABLE": "1", "GOMP_SPINCOUNT": "1000"}
        self._early = _early(environment)
        self._server: subprocess.Popen[bytes] | None = None
        self._address = ""

    def takes(self, environment: dict[str, str]) -> bool:
        """Whether a command with these variables may be forked."""
        return _early(environment) == self._early

    def run(
        self, arguments: list[str], environment: dict[str, str], folder: Path, timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """`python ARGUMENTS` in a folder; arguments are `script.py ...` or `-m module ...`."""
        self._start()
        outputs = [os.pipe() for _ in range(2)]
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as line:
            line.settimeout(timeout)
            line.connect(self._address)
            job = json.dumps({"arguments": arguments, "environment": environment, "folder": str(folder)}).encode()
            socket.send_fds(line, [len(job).to_bytes(4, "big")], [write for _, write in outputs])
            line.sendall(job)
            for _, write in outputs:
                os.close(write)
            texts = ["", ""]

            def read(place: int) -> None:
                with open(outputs[place][0], encoding="utf-8", errors="strict") as file:
                    texts[place] = file.read()

            readers = [threading.Thread(target=read, args=(place,)) for place in range(2)]
            for reader in readers:
                reader.start()
            child = int.from_bytes(_exactly(line, 4), "big")
            try:
                code = int.from_bytes(_exactly(line, 4), "big", signed=True)
            except TimeoutError:
                os.killpg(child, signal.SIGKILL)
                raise subprocess.TimeoutExpired(arguments, timeout) from None
            for reader in readers:
                reader.join()
        return subprocess.CompletedProcess([sys.executable, *arguments], code, *texts)

    def _start(self) -> None:
        if self._server is None:
            self._address = f"{tempfile.mkdtemp(prefix='fork')}/line"
            self._server = subprocess.Popen(
                [sys.executable, __file__, self._address], stdout=subprocess.PIPE, env=self._environment
            )
            assert self._server.stdout is not None and self._server.stdout.readline() == b"ready\n"

    def close(self) -> None:
        """End the server."""
        if self._server is not None:
            self._server.kill()
            self._server.wait()


def _exactly(line: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        more = line.recv(size - len(found))
        if not more:
            raise ConnectionError("the fork server ended")
        found += more
    return found


def _serve(address: str) -> dict[str, Any]:
    """In the server: never returns. In a child: what it is to run."""
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    import transformers.convert_slow_tokenizer
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401
    from transformers import Trainer  # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    # Half a second at the first save of a process; kept from then on.
    get_checkpoint_conversion_mapping("gpt2")
    # As the program does with what it loads (`loading.py`).
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    os.write(1, b"ready\n")
    parent = os.getppid()
    while os.getppid() == parent:
        listener.settimeout(5)
        try:
            line, _ = listener.accept()
        except TimeoutError:
            continue
        if os.fork():
            line.close()
            continue
        # Of each command a process that waits for it.
        listener.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        line.settimeout(None)
        size, descriptors, _, _ = socket.recv_fds(line, 4, 2)
        job = json.loads(_exactly(line, int.from_bytes(size, "big")))
        child = os.fork()
        if not child:
            os.setsid()
            line.close()
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for number, descriptor in enumerate(descriptors, 1):
                os.dup2(descriptor, number)
                os.close(descriptor)
            return job
        for descriptor in descriptors:
            os.close(descriptor)
        line.sendall(child.to_bytes(4, "big"))
        _, status = os.waitpid(child, 0)
        line.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, "big", signed=True))
        os._exit(0)
    os._exit(0)


def _run(job: dict[str, Any]) -> None:
    arguments = job["arguments"]
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    sys.path[0] = job["folder"]
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    _run(_serve(sys.argv[1]))
