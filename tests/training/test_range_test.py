"""`--lr_find`: the curve of a range test, what is read from it, and the run that makes it."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from PIL import Image

from slimpajama_hf import palette
from slimpajama_hf.session import range_test_result
from slimpajama_hf.settings import arguments
from slimpajama_hf.training import range_test
from tests.conftest import NANO, read_ledger, run_script


def curve(best: float, seed: int, scatter: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
    """Losses that fall from 8 to 6 up to the rate `best`, then rise; documents differ by `scatter` nats."""
    rates = np.array([range_test.rate(step, arguments.STEPS) for step in range(arguments.STEPS)])
    decades = np.log10(rates / best)
    losses = 6 + 2 / (1 + np.exp(4 * (decades + 1))) + 1.5 * np.maximum(decades, 0)
    return rates, losses + scatter * np.random.default_rng(seed).normal(size=len(rates))


@pytest.mark.parametrize("best", [3e-4, 3e-3, 3e-2])
def test_it_finds_where_the_falling_ends_within_half_a_decade(best):
    for seed in range(10):
        found = range_test.read(*curve(best, seed))
        assert found.lowest is not None and abs(np.log10(found.lowest / best)) < 0.6
        assert found.suggested == pytest.approx(found.lowest / range_test.SAFETY, rel=0.34)


def test_a_loss_that_does_not_fall_suggests_nothing():
    rates, losses = curve(1e-3, 0)
    flat = 8 + 0.8 * np.random.default_rng(1).normal(size=len(losses))
    assert range_test.read(rates, flat).suggested is None
    assert range_test.read(rates, np.full(len(rates), np.nan)).suggested is None


@pytest.mark.long
def test_the_real_thing(shards, tmp_path):
    flags = [
        *NANO,
        "--dataset",
        f"{shards}/*.jsonl.zst",
        "--epochs",
        "9",
        "--output_dir",
        str(tmp_path / "run"),
        "--lr_find",
        "--eval_steps",
        "50",
    ]
    for _ in range(2):  # a second time in the same folder
        done = run_script(*flags)
        assert done.returncode == 0, done.stderr
        assert re.search(r"a rate to stay at: --learning_rate [0-9.e-]+", done.stderr), done.stderr
    assert "learning rate rises from 1e-06 to 0.3" in done.stderr and "steps of warm-up" not in done.stderr
    # Scores, samples and losses at rates that are far too much say nothing.
    assert not re.search("held out|perplexity|sample @|final loss", done.stderr), done.stderr
    folder = tmp_path / "run-lr_find"
    rows = read_ledger(folder)
    assert not (tmp_path / "run").exists() and not list(folder.glob("checkpoint-*"))
    assert [row["learning_rate"] for row in (rows[0], rows[-1])] == pytest.approx([1e-6, 0.3])
    assert len(rows) == arguments.STEPS
    with Image.open(folder / range_test_result.CHART) as picture:
        assert picture.size == (1200, 675)


@pytest.mark.parametrize("best", [3e-5, 3e-3, 0.1])
def test_the_names_in_its_picture_are_apart_and_inside(best):
    """Of the two marked rates, which are close together, and of the ticks; the dots are of our colour, all in sight."""
    rates, losses = curve(best, 1)
    found = range_test.read(rates, losses)
    figure = range_test_result.draw(found, losses)
    figure.canvas.draw()
    (ax,) = figure.axes
    names = [text for text in ax.texts if text.get_gid() == "name"]
    assert [text.get_text().split("\n")[1] for text in names] == [f"{found.suggested:.2g}", f"{found.lowest:.2g}"]
    left, right = ax.get_xlim()
    ticks = [label for label in ax.get_xticklabels() if left <= label.get_position()[0] <= right]
    boxes = [text.get_window_extent() for text in [*names, *ticks]]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width for box in boxes)
    assert all("$" not in label.get_text() for label in ticks)
    dots = next(line for line in ax.lines if line.get_gid() == "steps")
    assert dots.get_color() == palette.POINT and dots.get_markersize() >= 5
    low, high = ax.get_ylim()
    before = losses[rates < found.lowest]
    assert ((low < before) & (before < high)).mean() > 0.95


def test_what_does_not_go_with_it_is_one_sentence(shards, tmp_path):
    done = run_script(*NANO, "--dataset", f"{shards}/*.jsonl.zst", "--lr_find", "--resume_from_checkpoint", "true")
    assert done.returncode == 2
    assert "error: --lr_find: a test of its own; leave --resume_from_checkpoint" in done.stderr
