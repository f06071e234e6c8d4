"""Bars in terminals of every width: a real pty, and what a person then sees in its last line."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from slimpajama_hf import bars
from tests.conftest import ROOT, environment

NUMBERS = {"loss": "5.4732", "acc": "21.1%", "tps": "4316.0", "lr": "8.30e-05", "eta": "4.5m"}

#: A bar of training with a line said above it and something that is waited for in between.
PROGRAM = """
import time
from slimpajama_hf import bars, screen
bar = bars.TrainingBar(6000, 1464)
for step in range(3):
    bar.update(5.4732, 0.211, 8.3e-5, 256, 256 / 4316)
    screen.say("said above")
    with screen.Waiting("waiting for " + "something with a long name " * 9):
        time.sleep(0.25)
    with bars.Counting("Scoring held-out documents", 200) as counting:
        time.sleep(0.25)
        counting(57)
bar.close()
"""


def in_a_terminal(columns: int, program: str) -> list[str]:
    """What the lines of a terminal of that width show in turn: each text that was written from one column to the end."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = {name: value for name, value in environment().items() if name != "COLUMNS"}
    process = subprocess.Popen([sys.executable, "-c", program], stderr=follower, cwd=ROOT, env=env)
    os.close(follower)
    written = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:
            break
        if not part:
            break
        written += part
    os.close(leader)
    assert process.wait() == 0
    return [text for text in re.split("[\r\n]+", written.decode()) if text.strip()]


@pytest.mark.parametrize(
    ("columns", "there", "gone"),
    [
        (60, {"24%", *NUMBERS} - {"tps"}, {"tps", "1467/6000", "00:", "█"}),
        (80, {"Training: ", "24%", "█", "1467/6000", *NUMBERS} - {"tps"}, {"tps", "00:"}),
        (100, {"Training: ", "24%", "█", "1467/6000", *NUMBERS}, {"00:"}),
        (132, {"Training: ", "24%", "█", "1467/6000", "00:", *NUMBERS}, set()),
        (0, {"Training: ", "24%", *NUMBERS} - {"tps"}, {"tps", "00:"}),
    ],
)
def test_in_a_terminal_no_number_is_cut_and_no_line_is_too_long(columns, there, gone):
    shown = in_a_terminal(columns, PROGRAM)
    assert all(len(text) < (columns or 80) for text in shown)
    last = shown[-1]
    for part in there:
        assert (f"{part}={NUMBERS[part]}" if part in NUMBERS else part) in last, last
    assert not [part for part in gone if part in last], last
    assert any("said above" in text for text in shown)
    waited = [text for text in shown if "waiting for" in text]
    assert waited and all(re.search(r"… \(0\.\ds\)$", text.strip()) for text in waited)
    assert any("57/200" in text for text in shown)
    # The numbers are whole in every picture, not in the last alone.
    for text in shown:
        for name, value in re.findall(r"(\w+)=([^,\]]*)", text):
            assert value == NUMBERS[name], text


def test_parts_go_in_one_order_at_every_width():
    before = set(NUMBERS)
    for columns in range(160, 3, -1):
        text = bars.line("Training", 1467, 6000, "00:40<01:46", NUMBERS, columns)
        assert len(text) <= columns
        there = {name for name in NUMBERS if f"{name}={NUMBERS[name]}" in text}
        assert there <= before and len(re.findall(r"\w=", text)) == len(there)
        if there != set(NUMBERS):
            assert "00:40" not in text
        before = there
    order = [name for name in bars.LEFT_OUT_FIRST if name in NUMBERS]
    assert order == ["tps", "eta", "lr", "acc", "loss"] and bars.LEFT_OUT_FIRST[0] == "times"


def test_percents_are_those_of_whole_numbers():
    assert all(bars.line("x", done, 100).startswith(f"x: {done:3d}%|") for done in range(101))
