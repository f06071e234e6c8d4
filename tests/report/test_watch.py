"""The report of a run that is on: a real server, asked by real connections and by a real browser."""

from __future__ import annotations

import base64
import contextlib
import http.client
import itertools
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from slimpajama_hf.child import Child
from slimpajama_hf.record import lock
from tests.conftest import NANO, ROOT, environment, run_command
from tests.report import browser
from tests.report.browser import Browser
from tests.report.test_report import go, make_run

needs_browser = pytest.mark.skipif(browser.PROGRAM is None, reason=browser.NONE_HERE)

# A shell starts what it puts in the background with Ctrl-C ignored, tests and all.
_HEARD = partial(signal.signal, signal.SIGINT, signal.default_int_handler)


class Served:
    """`report RUN... --watch` in a process of its own."""

    def __init__(self, *folders: Path) -> None:
        command = [sys.executable, "-m", "slimpajama_hf", "report", *map(str, folders), "--watch"]
        self.process = subprocess.Popen(
            command, env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=_HEARD
        )
        assert self.process.stderr is not None
        said = self.process.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)(/[\w-]{16,}/)", said)
        assert found, said
        self.address, self.port, self.root = found[0], int(found[1]), found[2]

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def ask(self, path: str, method: str = "GET", host: str | None = None, **headers: str) -> tuple[int, Any, bytes]:
        """Status, headers and body; `path` as it is, whatever it has in it."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            connection.putrequest(method, path, skip_host=True)
            for name, value in {"Host": host or f"127.0.0.1:{self.port}", **headers}.items():
                if value:
                    connection.putheader(name.replace("_", "-"), value)
            connection.endheaders()
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

    def events(self, path: str) -> Iterator[tuple[str, Any]]:
        """(name, data) of the events of a stream as they come."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as line:
            line.sendall(f"GET {self.root}{path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n\r\n".encode())
            name = ""
            for text in line.makefile(encoding="utf-8"):
                if text.startswith("event: "):
                    name = text.removeprefix("event: ").strip()
                elif text.startswith("data: "):
                    yield name, json.loads(text.removeprefix("data: "))


def steps_of(events: Iterator[tuple[str, Any]], wanted: int) -> list[tuple[int, int]]:
    """From and to of the rows that came until there were `wanted`."""
    found: list[tuple[int, int]] = []
    for name, data in events:
        if name == "rows":
            found.append((data["from"], data["to"]))
            if data["to"] >= wanted:
                return found
    raise AssertionError(f"the stream ended with {found}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("whole") / "run", 120)


@pytest.fixture
def young(whole: Path, tmp_path: Path) -> tuple[Path, list[bytes]]:
    """The run as it was after 80 steps, and the rows that are still to come."""
    folder = tmp_path / "young"
    shutil.copytree(whole, folder)
    lines = (folder / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "ledger.jsonl").write_bytes(b"".join(lines[:80]))
    return folder, lines[80:]


def append(folder: Path, data: bytes) -> None:
    with open(folder / "ledger.jsonl", "ab") as file:
        file.write(data)


def test_who_may_not_ask_is_refused_and_ctrl_c_ends_it(whole):
    with Served(whole) as served:
        here, root = f"127.0.0.1:{served.port}", served.root
        for path in (root, f"{root}run/0/", f"{root}run/0/data", f"{root}run/0/events"):
            token = root.strip("/")
            for refused in (
                served.ask(path, host="evil.example"), served.ask(path, host=f"evil.example:{served.port}"),
                served.ask(path, host=f"127.0.0.1:{served.port + 1}"), served.ask(path, Origin="http://evil.example"),
                served.ask(path, Origin="null"), served.ask(path, Origin=f"http://localhost:{served.port}"),
                served.ask(path, Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors", Sec_Fetch_Dest="script"),
                served.ask(path, Sec_Fetch_Site="same-site", Sec_Fetch_Mode="cors", Sec_Fetch_Dest="empty"),
                served.ask(path.replace(token, "")), served.ask(path.replace(token, token[:-1])),
                served.ask(path.replace(token, token.swapcase())), served.ask(path.replace(root, "/")),
                served.ask(path.replace(token, "%ff")),
            ):  # fmt: skip
                assert refused[0] == 403 and refused[2].count(b"\n") == 1, (path, refused)
            for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE"):
                status, headers, _ = served.ask(path, method)
                assert (status, headers["Allow"]) == (405, "GET"), method
        for climbing in ("..%2f..%2f..%2fetc%2fpasswd", "run/0/../../../../etc/passwd", "%2e%2e/%2e%2e/run.json",
                         "run/0/..%2fledger.jsonl", "run/0/ledger.jsonl", "run/1/", "run/-1/", "run/0%00/", "run/0/data/..%5c"):  # fmt: skip
            status, _, body = served.ask(root + climbing)
            assert status == 404 and body == b"there is no such page\n", (climbing, status, body)
        for ours in ({}, {"Origin": f"http://{here}"}, {"Sec_Fetch_Site": "same-origin"},
                     {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "document"}):  # fmt: skip
            status, headers, body = served.ask(f"{root}run/0/", **ours)
            assert status == 200 and b"connect-src 'self'" in body and headers["X-Frame-Options"] == "DENY"
        assert served.ask(f"{root}run/0/", host=f"localhost:{served.port}")[0] == 200
        tag = served.ask(f"{root}run/0/data")[1]["ETag"]
        assert served.ask(f"{root}run/0/data", If_None_Match=tag)[0] == 304
        addresses = {each.laddr.ip for each in psutil.Process(served.process.pid).net_connections() if not each.raddr}
        assert addresses == {"127.0.0.1"}
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(timeout=60) == 130


def test_rows_come_once_also_half_written_ones_and_slow_readers_wait_alone(young):
    folder, coming = young
    with Served(folder) as served, contextlib.ExitStack() as opened:
        for number in range(20):
            line = opened.enter_context(socket.create_connection(("127.0.0.1", served.port)))
            line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            path = ("run/0/data", "run/0/", "run/0/events?from=0-0")[number % 3]
            whole = f"GET {served.root}{path} HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\n\r\n".encode()
            # Half of them stop within their request, the others never read an answer.
            line.sendall(whole[:-9] if number < 10 else whole * 50)
        start = time.monotonic()
        assert served.ask(f"{served.root}run/0/data")[0] == 200
        assert time.monotonic() - start < 5
        events = served.events("run/0/events?from=0-80")
        assert next(events)[0] == "state"
        append(folder, coming[0] + coming[1][:50])
        assert steps_of(events, 81) == [(80, 81)]
        append(folder, coming[1][50:] + b"".join(coming[2:10]))
        assert steps_of(events, 90)[-1][1] == 90
        # Whose connection broke goes on where it was.
        assert steps_of(served.events("run/0/events?from=0-85"), 90) == [(85, 90)]
        # A ledger that begins anew: what pages have is of another run.
        (folder / "ledger.jsonl").write_bytes(b"".join(coming[:5]))
        assert any(name == "content" and data["tag"].startswith("1-") for name, data in itertools.islice(events, 40))
        # What cannot be read is said, and is no end.
        (folder / "ledger.jsonl").unlink()
        (folder / "ledger.jsonl").mkdir()
        states = (data for name, data in events if name == "state")
        assert any("IsADirectoryError" in data["trouble"] for data in itertools.islice(states, 20))
        assert served.ask(f"{served.root}run/0/")[0] == 200


def test_the_new_rows_are_those_of_the_ledger(young):
    import numpy as np

    from slimpajama_hf.record.columns import read_columns
    from slimpajama_hf.record.run_folder import RunFolder
    from slimpajama_hf.report import machine
    from slimpajama_hf.report.live import LiveRun

    folder, coming = young
    run = LiveRun(RunFolder(folder), "run", machine.Gpus())
    append(folder, b"".join(coming))
    run.look()
    run.gather()
    both = [base64.b64decode(run.rows_from(first)["packed"]) for first in (0, 80)]
    (every, all_rows), (_, tail) = map(_unpacked, both)
    assert every["steps"] == 120 and every["headline"]["loss"] == pytest.approx(
        read_columns(folder / "ledger.jsonl").loss[-50:].mean()
    )
    for name in set(all_rows) - {"row", "sha1", "taught", "taught_next"}:
        np.testing.assert_array_equal(all_rows[name][80:], tail[name], name)
    measured = np.flatnonzero(np.isfinite(all_rows["taught"]))
    assert [step for step, *_ in every["taught"]] == measured.tolist()
    assert tail["row"][0] == 240 and len(tail["sha1"]) == 40 * 20


def _unpacked(packed: bytes) -> tuple[Any, dict[str, Any]]:
    """What `packing.pack` packed."""
    import gzip
    import struct

    import numpy as np

    data = gzip.decompress(packed)
    (size,) = struct.unpack("<I", data[:4])
    head = json.loads(data[4 : 4 + size])
    arrays = {}
    for name, (kind, count, offset) in head["arrays"].items():
        width, start = np.dtype(kind).itemsize, 4 + size + offset
        raw = np.frombuffer(data[start : start + width * count], np.uint8).reshape(width, count)
        arrays[name] = np.ascontiguousarray(raw.T).view(kind).reshape(-1)
    return head["meta"], arrays


@needs_browser
@pytest.mark.long
def test_a_row_appears_within_two_seconds_and_the_slider_stays(young, whole, tmp_path):
    folder, coming = young
    (folder / lock.FILE_NAME).write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
    record = json.loads((folder / "run.json").read_text())
    arithmetic = {"flops": 2e9, "per_token": 1e5, "per_token_squared": 0.0, "session": len(record["sessions"])}
    (folder / "run.json").write_text(json.dumps(record | {"arithmetic": arithmetic}))
    with Served(folder, whole) as served, Browser(tmp_path / "profile") as tab:
        tab.open(f"{served.address}run/0/", "document.querySelector('#now').textContent.includes('80 of 240 steps')")
        go(tab, 20)
        seconds = []
        for number, row in enumerate(coming[:5], 81):
            append(folder, row)
            start = time.monotonic()
            tab.until(f"document.querySelector('#figure-steps').textContent === '{number}'")
            seconds.append(time.monotonic() - start)
        assert statistics.median(seconds) < 2, seconds
        assert tab.text("#step-title") == "20" and tab.value("document.querySelector('#slider').value") == "20"
        assert tab.value("document.querySelector('#slider').max") == "84"
        now = tab.text("#now")
        rows = [json.loads(row) for row in (folder / "ledger.jsonl").read_text().splitlines()[-50:]]
        used = 1e5 * sum(row["tokens"] for row in rows) / (50 * 0.05) / 2e9
        assert f"{used:.0%}".replace("%", " %") in now and "of 2 GFLOP/s measured as the run began" in now
        assert re.search(r"7\.[78] s155 steps", now) and "of the process that trains" in now, now
        # A row that came is a step like another.
        go(tab, 84)
        assert tab.text("#passport-sha1") == rows[-1]["text_sha1"] and tab.text("#passport-row") == "252"
        # Passports and samples that came are there once all is fetched anew.
        append(folder, b"".join(coming[5:]))
        tab.until("document.querySelector('#figure-steps').textContent === '120'")

        tab.open(served.address)
        assert tab.value("[...document.querySelectorAll('#runs-body a')].map(a => a.textContent)") == ["young", "run"]
        assert "loss at step 120" in tab.text("#runs-head") and "training" in tab.text("#runs-body")
        append(folder, coming[0].replace(b'"step":80', b'"step":120'))
        tab.until("document.querySelector('#runs-body').textContent.includes('121 of 240')", timeout=10)
        tab.value("document.querySelector('#axis [data-value=seconds]').click()")
        assert "at 6.0 s" in tab.text("#keys")
        for width in (390, 1440):
            tab.size(width, 900)
            tab.frame()
            assert tab.value("document.documentElement.scrollWidth") <= width
        assert tab.errors == []
        served.process.send_signal(signal.SIGINT)
        served.process.wait(timeout=60)
        tab.until("document.querySelector('#live').textContent === 'not connected'")


def test_configurations_are_compared_by_key(whole, tmp_path):
    from slimpajama_hf.report import several, watch

    other = shutil.copytree(whole, tmp_path / "run")
    (other / "run_config.yaml").write_text('dataset: "embedded"\nseed: 2\nlr_find: true\noutput_dir: "x"\n')
    runs = watch.follow([whole, other])
    assert len({run.name for run in runs}) == 2
    found = {key: values for key, *values in several.differences(runs)}
    assert found["seed"] == [None, "2"] and found["lr_find"] == [None, "true"] and "output_dir" not in found
    for run in runs:
        run.look()
    together = several.together(runs)
    first, second = together["runs"]
    assert together["equal_steps"] == 120 and first["equal_loss"] == second["equal_loss"] == pytest.approx(
        first["loss"]
    )
    assert first["curve"]["steps"] == list(range(1, 121)) and len(first["curve"]["loss"]) == 120


def test_what_belongs_to_watch_is_refused_without_it_and_the_other_way_round(whole):
    for words, said in (
        (["--port", "9000"], "it belongs to --watch"), (["--watch", "--animate"], "one or the other"),
        ([str(whole), "--watch"], "the same folder is named twice"),
    ):  # fmt: skip
        done = run_command("report", str(whole), *words)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run_command("report", str(whole), "--watch", "--port", str(taken.getsockname()[1]))
    assert done.returncode == 1 and "is taken; choose another with --port" in done.stderr


@needs_browser
def test_the_page_is_there_before_the_run_and_says_when_its_program_ends(whole, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    beside = Child("slimpajama_hf.report.watch", str(folder))
    with contextlib.ExitStack() as at_end, Browser(tmp_path / "profile") as tab:
        at_end.callback(beside.end, patience_seconds=5)
        address = beside.answers.get(timeout=60)["address"]
        tab.open(address, "document.querySelector('#now').textContent.includes('waiting for the run')")
        assert tab.text("h1") == "run" and tab.text("#figure-steps") == "0"
        shutil.copytree(whole, folder, dirs_exist_ok=True)
        tab.until("document.querySelector('#slider').max === '119'", timeout=20)
        assert tab.text("h1") == "tiny on <script>" and tab.text("#figure-steps") == "120"
        at_end.close()
        assert not beside.is_alive
        tab.until("document.querySelector('#live').textContent === 'ended · step 120'", timeout=10)
        assert tab.errors == []


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux ends a child with its parent")
@pytest.mark.long
def test_a_run_with_watch_serves_its_page_from_its_start_and_the_page_ends_with_it(shards, tmp_path):
    run = tmp_path / "run"
    flags = [*NANO, "--dataset", f"{shards}/*.jsonl.zst", "--max_seq_length", "32", "--max_steps", "100000", "--epochs",
             "100000", "--viz_interval", "1000000", "--display_samples", "1000000", "--output_dir", str(run), "--watch"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run_clm_slimpajama.py"), *flags],
        env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        address = next(line.split()[1] for line in process.stderr if " page  http" in line)
        parts = urlsplit(address)
        served = object.__new__(Served)
        served.port, served.root = int(parts.port or 0), parts.path
        status, _, body = served.ask(f"{served.root}run/0/")
        assert status == 200 and b'data-watch="yes"' in body
        state = next(
            data
            for name, data in served.events("run/0/events?from=0-0")
            if name == "state" and data["steps"] > 50 and data["used"]
        )
        assert state["training"] is True and state["max_steps"] == 100000 and state["left_seconds"] > 0
        assert state["process_bytes"] == pytest.approx(psutil.Process(process.pid).memory_info().rss, rel=0.5)
        assert state["rate"] > 1e8 and 0 < state["used"] < 1
        assert "\nwatch:" not in (run / "run_config.yaml").read_text()
        (server,) = psutil.Process(process.pid).children()
        assert server.nice() == 10
        process.kill()
        server.wait(timeout=20)
    finally:
        process.kill()
        process.wait()
