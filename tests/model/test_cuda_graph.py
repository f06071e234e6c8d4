"""Capturing, by `torch.cuda.graph` itself over a driver that is made up: what is left behind when it is refused."""

from __future__ import annotations

import pytest
import torch

from slimpajama_hf.model import cuda_graph


class Stream:
    def wait_stream(self, other):
        pass


class Driver:
    """The streams of a device, and what its captures do."""

    def __init__(self, monkeypatch) -> None:
        self.current = self.first = Stream()
        self.begin_fails = self.end_fails = None
        self.synchronized = 0
        driver = self

        class Graph:
            def __init__(self) -> None:
                self.replays = 0

            def capture_begin(self, *_, **__):
                if driver.begin_fails:
                    raise RuntimeError(driver.begin_fails)

            def capture_end(self):
                if driver.end_fails:
                    raise RuntimeError(driver.end_fails)

            def replay(self):
                self.replays += 1

        class Switched:
            def __init__(self, stream) -> None:
                self.stream = stream

            def __enter__(self):
                self.before, driver.current = driver.current, self.stream

            def __exit__(self, *_):
                driver.current = self.before

        def synchronize():
            self.synchronized += 1

        def set_stream(stream):
            self.current = stream

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", Switched)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: driver.current)
        monkeypatch.setattr(torch.cuda, "set_stream", set_stream)
        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", None)
        monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)


@pytest.fixture
def driver(monkeypatch):
    return Driver(monkeypatch)


def test_work_is_done_three_times_captured_once_and_replayed(driver):
    calls = []

    def work():
        calls.append(driver.current is driver.first)
        return len(calls)

    recording = cuda_graph.Recording(work)
    assert recording.result == 4 and calls == [False] * 4, "aside, and in the stream of the capture"
    recording.replay()
    assert recording._graph.replays == 1 and len(calls) == 4 and driver.current is driver.first


@pytest.mark.parametrize("where", ["begin_fails", "end_fails"])
def test_a_refused_capture_leaves_the_stream_as_it_was(driver, where):
    """`torch.cuda.graph` alone leaves its own stream current: whatever came next would not see what was done before."""
    setattr(driver, where, "CUDA error: operation not permitted\nwhen stream is capturing")
    with pytest.raises(cuda_graph.Refused, match="not permitted when stream is capturing"):
        cuda_graph.Recording(lambda: 1)
    assert driver.current is driver.first and driver.synchronized >= 1

    driver.current = driver.first
    with pytest.raises(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        pass
    assert driver.current is not driver.first, "torch mends it now: the work-around can go"


@pytest.mark.parametrize("end", [None, "CUDA error: operation failed due to a previous error during capture"])
@pytest.mark.parametrize("at", [1, 4])
def test_a_lack_of_memory_is_said_as_what_it_is(driver, end, at):
    """Also where the capture that it broke is refused in its place."""
    driver.end_fails = end
    calls = []

    def work():
        calls.append(1)
        if len(calls) == at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(torch.OutOfMemoryError, match=r"2\.00 GiB"):
        cuda_graph.Recording(work)
    assert driver.current is driver.first


def test_only_cuda_captures():
    assert cuda_graph.recorder_of(torch.device("cpu")) is None
    assert cuda_graph.recorder_of(torch.device("mps")) is None
    assert cuda_graph.recorder_of(torch.device("cuda:1")) is cuda_graph.Recording
