"""The animation of a run: from its files, every frame a different one, ending with the run as it is."""

from __future__ import annotations

import io
import json
import shutil

import pytest
from PIL import Image

from slimpajama_hf.views import animation
from tests.conftest import run_command


def test_the_command_draws_a_run(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    done = run_command("report", str(run), "--animate")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(run / "training.gif")
    film = Image.open(io.BytesIO((run / "training.gif").read_bytes()))
    # A run of 40 steps has no more than 40 different frames.
    assert film.n_frames == len(animation.frame_steps(40)) > 20
    seen = set()
    for number in range(film.n_frames):
        film.seek(number)
        seen.add(film.convert("RGB").tobytes())
        assert film.info["duration"] == (4000 if number == film.n_frames - 1 else 140)
    assert len(seen) == film.n_frames


@pytest.mark.parametrize("steps", [1, 2, 40, 100_000])
def test_frames_begin_at_the_first_step_and_end_at_the_last(steps):
    shown = animation.frame_steps(steps)
    assert shown[0] == 1 and shown[-1] == steps and shown == sorted(set(shown)) and len(shown) <= animation.FRAMES


def test_what_is_shown_was_written_by_then():
    entries = [{"step": step} for step in (0, 10, 30)]
    assert [animation.written_at(entries, step) for step in (0, 9, 10, 99)] == [
        entries[0], entries[0], entries[1], entries[2],
    ]  # fmt: skip
    assert animation.written_at(entries[1:], 5) is None


@pytest.mark.long
def test_hostile_texts_and_missing_files(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "samples.jsonl").unlink()
    texts = [{"prompt": "$x_1$ \x1b[31m", "output": "\u202eשלום 👩‍👩‍👧 " + "w" * 500}] * 3
    (run / "prompts.jsonl").write_text(json.dumps({"step": 0, "texts": texts}) + "\n")
    assert animation.write(run).stat().st_size > 10_000
    (run / "prompts.jsonl").unlink()
    assert animation.write(run).stat().st_size > 10_000


def test_a_run_without_a_step_is_said(tmp_path):
    (tmp_path / "ledger.jsonl").write_text("")
    done = run_command("report", str(tmp_path), "--animate")
    assert done.returncode == 1 and "nothing to animate yet" in done.stderr and "Traceback" not in done.stderr
