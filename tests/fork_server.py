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
import select
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


class Forked:
    """A command that was begun, as `subprocess.Popen` has it (those of its names that tests use)."""

    def __init__(self, arguments: list[str], line: socket.socket, stdout: Any, stderr: Any) -> None:
        self.args, self.stdout, self.stderr = arguments, stdout, stderr
        self.returncode: int | None = None
        self._line = line
        self.pid = int.from_bytes(_exactly(line, 4), "big")

    def poll(self) -> int | None:
        """The exit code, below 0 for a signal; None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            if timeout is not None and not select.select([self._line], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = int.from_bytes(_exactly(self._line, 4), "big", signed=True)
            self._line.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote to its pipes, and its end."""
        texts = {}

        def read(name: str, file: Any) -> None:
            with file:
                texts[name] = file.read()

        pipes = {"stdout": self.stdout, "stderr": self.stderr}
        readers = [
            threading.Thread(target=read, args=pipe, daemon=True) for pipe in pipes.items() if pipe[1] is not None
        ]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join()
        return texts.get("stdout", ""), texts.get("stderr", "")


class ForkServer:
    """Starts the server when it is first needed; `run` is `subprocess.run` of `python ARGUMENTS`."""

    def __init__(self, environment: dict[str, str]) -> None:
        # What the program would set before it imports torch (`devices.py`).
        self._environment = environment | {"THP_MEM_ALLOC_ENABLE": "1", "GOMP_SPINCOUNT": "1000"}
        self._early = _early(environment)
        self._server: subprocess.Popen[bytes] | None = None
        self._address = ""

    def takes(self, environment: dict[str, str]) -> bool:
        """Whether a command with these variables may be forked: nothing differs that Python reads as it starts."""
        places = environment.get("PYTHONPATH", "").split(os.pathsep)
        return _early(environment) == self._early and not any(
            Path(place, "sitecustomize.py").exists() for place in places
        )

    def run(
        self, arguments: list[str], environment: dict[str, str], folder: Path, timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """`python ARGUMENTS` in a folder; arguments are `script.py ...` or `-m module ...`."""
        child = self.start(arguments, environment, folder, subprocess.PIPE, subprocess.PIPE)
        try:
            texts = child.communicate(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess([sys.executable, *arguments], child.returncode or 0, *texts)

    def start(
        self, arguments: list[str], environment: dict[str, str], folder: Path, stdout: Any = None, stderr: Any = None
    ) -> Forked:
        """The same begun; `stdout` and `stderr` as `subprocess.Popen` takes them."""
        self._start()
        line = socket.socket(socket.AF_UNIX)
        line.connect(self._address)
        job = json.dumps({"arguments": arguments, "environment": environment, "folder": str(folder)}).encode()
        reads: list[Any] = []
        writes: list[int] = []
        for number, wanted in enumerate((stdout, stderr), 1):
            if wanted == subprocess.PIPE:
                read, write = os.pipe()
                reads.append(open(read, encoding="utf-8"))  # noqa: SIM115
            else:
                reads.append(None)
                if wanted == subprocess.DEVNULL:
                    write = os.open(os.devnull, os.O_WRONLY)
                else:
                    # A number, a file, or what this process has itself.
                    write = os.dup(number if wanted is None else wanted if isinstance(wanted, int) else wanted.fileno())
            writes.append(write)
        socket.send_fds(line, [len(job).to_bytes(4, "big")], writes)
        line.sendall(job)
        for write in writes:
            os.close(write)
        return Forked(arguments, line, *reads)

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
