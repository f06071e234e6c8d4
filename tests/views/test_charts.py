"""The charts draw the ledger's own numbers, stay bounded on long runs and survive hostile text."""

from __future__ import annotations

import io
import itertools
import math
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from slimpajama_hf import palette
from slimpajama_hf.record.columns import NUMBERS, Columns
from slimpajama_hf.views import charts, drawing
from tests.conftest import NANO, run_command, run_script

CAPTION = charts.Caption("A run", "a model · a corpus", 20_000)
DOMAINS = ["RedPajamaCommonCrawl", "RedPajamaC4", "RedPajamaGithub"]


def run_of(steps: int, **columns: Any) -> Columns:
    """A ledger of `steps` rows with plausible values; `columns` replaces columns, whole or as {step: value}."""
    noise = np.random.default_rng(7)
    step = np.arange(steps)
    domain = noise.integers(0, 3, steps) if steps > 3 else step % 3
    values: dict[str, np.ndarray] = {
        "step": step,
        "loss": 4 + 4.3 * np.exp(-step / 500) + noise.normal(0, 0.3, steps) - 0.5 * (domain == 2),
        "accuracy": np.clip(0.3 * (1 - np.exp(-step / 500)) + noise.normal(0, 0.03, steps), 0, 1),
        "throughput": noise.normal(3_000, 150, steps),
        "learning_rate": np.minimum(1e-3, 1e-6 + step * 1e-6),
        "grad_norm": np.ones(steps),
        "tokens": np.full(steps, 256),
        "text_bytes": np.full(steps, 1_000),
        "code_bits": np.full(steps, 2_000.0),
        # Measured every 100 steps: 8 documents, noise scale 49.
        "grad_square": np.where(step % 100 == 99, 1.0, np.nan),
        "grad_agreement": np.where(step % 100 == 99, 0.02 + noise.normal(0, 0.002, steps), np.nan),
        "loss_after": np.full(steps, np.nan),
        "next_loss": np.full(steps, np.nan),
    }
    for name, value in columns.items():
        if isinstance(value, dict):
            for at, replacement in value.items():
                values[name][at] = replacement
        else:
            values[name] = value
    run = Columns()
    # A million calls of `append` would take longer than all tests here together.
    run._store = {name: np.asarray(values.get(name, 0 * step), dtype) for name, dtype in NUMBERS.items()}
    run._store["domain"] = domain.astype(np.int32)
    run._store["samples"], run._store["predicted"] = np.ones(steps, np.int32), run.tokens - 1 if steps else step
    run._size = steps
    run.names["domain"] = DOMAINS[: int(domain.max()) + 1] if steps else []
    return run


def panel(figure: Figure, name: str) -> Axes:
    return next(ax for ax in figure.axes if ax.get_gid() == name)


def drawn(ax: Axes, gid: str) -> np.ndarray:
    """The (points, 2) data of the line or cloud `gid`."""
    for line in ax.lines:
        if line.get_gid() == gid:
            return np.asarray(line.get_xydata())
    for cloud in ax.collections:
        if cloud.get_gid() == gid:
            return np.asarray(cloud.get_offsets())
    raise AssertionError(f"nothing called {gid!r} is drawn")


def has(ax: Axes, gid: str) -> bool:
    return any(artist.get_gid() == gid for artist in ax.get_children())


def texts(ax: Axes, gid: str) -> list[str]:
    return [text.get_text() for text in ax.texts if text.get_gid() == gid]


def naive_mean(values: np.ndarray, window: int) -> np.ndarray:
    means = []
    for end in range(1, len(values) + 1):
        finite = [v for v in values[:end].tolist() if math.isfinite(v)][-window:]
        means.append(math.fsum(finite) / len(finite) if finite else math.nan)
    return np.array(means)


@pytest.mark.parametrize("window", [1, 2, 7, 50, 500])
@pytest.mark.parametrize("size", [0, 1, 2, 49, 50, 51, 100, 233])
def test_running_mean_equals_the_naive_one(window: int, size: int) -> None:
    values = np.random.default_rng(size).normal(4, 1, size)
    values[::9] = np.nan
    values[5:6] = np.inf
    np.testing.assert_allclose(drawing.running_mean(values, window), naive_mean(values, window), rtol=1e-12)


def naive_centred(values: np.ndarray, window: int) -> np.ndarray:
    kept = [v for v in values.tolist() if math.isfinite(v)]
    means, rank = [], -1
    for value in values.tolist():
        rank += math.isfinite(value)
        ahead = min(window - 1 - window // 2, max(rank, 0))
        around = kept[max(rank - window // 2, 0) : rank + ahead + 1]
        means.append(math.fsum(around) / len(around) if rank >= 0 else math.nan)
    return np.array(means)


@pytest.mark.parametrize("window", [1, 2, 7, 50, 500])
@pytest.mark.parametrize("size", [0, 1, 2, 12, 49, 50, 51, 100, 233])
def test_centred_mean_equals_the_naive_one(window: int, size: int) -> None:
    values = np.random.default_rng(size).normal(4, 1, size)
    values[::9] = np.nan
    values[5:6] = np.inf
    np.testing.assert_allclose(drawing.centred_mean(values, window), naive_centred(values, window), rtol=1e-12)


def test_the_line_does_not_lag_behind_a_falling_loss() -> None:
    """Where loss falls by 0.03 a step, a mean of the 50 steps before lies 0.75 nats too high."""
    falling = 9 - 0.03 * np.arange(200)
    ax = panel(charts.draw(run_of(200, loss=falling), [], CAPTION), "loss")
    line = drawn(ax, "mean")[:, 1]
    assert np.abs(line - falling)[:175].max() < 0.02, "half a step: 50 steps have no middle one"
    assert np.abs(drawing.running_mean(falling, 50) - falling).max() > 0.7


def test_a_mean_says_of_how_many_steps_it_is() -> None:
    short, long = (charts.draw(run_of(steps), [], CAPTION) for steps in (12, 300))
    for name in ("loss", "recent"):
        assert "line: mean of 12 steps" in panel(short, name).get_ylabel()
        assert "line: mean of 50 steps" in panel(long, name).get_ylabel()
    assert charts.headline(run_of(12), 100)[1][2] == "mean of the last 12 steps"
    assert panel(short, "recent").get_title("left") == "Last 12 steps"
    assert panel(charts.draw(run_of(700), [{"step": 0}], CAPTION), "samples").get_title("left") == "Last 1 sample"


def test_running_mean_forgets_a_huge_value() -> None:
    values = np.full(1_000, 4.0)
    values[100] = 1e30
    means = drawing.running_mean(values, 50)
    assert means[100] > 1e28
    np.testing.assert_array_equal(means[150:], 4.0)


@pytest.mark.parametrize("steps", [1, 10, 300])
def test_series_draw_every_step_and_the_mean(steps: int) -> None:
    run = run_of(steps)
    figure = charts.draw(run, [], CAPTION)
    for name, values, digits in (
        ("loss", run.loss, 3),
        ("accuracy", 100 * run.accuracy, 1),
        ("throughput", run.throughput, 0),
    ):
        ax = panel(figure, name)
        np.testing.assert_array_equal(drawn(ax, "steps"), np.column_stack([run.step, values]))
        mean = naive_centred(values, 50)
        np.testing.assert_allclose(drawn(ax, "mean"), np.column_stack([run.step, mean]), rtol=1e-12)
        assert texts(ax, "end") == [f"{values[-50:].mean():,.{digits}f}"], "the number of the headline"
        assert f"mean of {min(steps, 50)} steps" in ax.get_ylabel() and ax.get_xlabel() == "optimizer step"


def test_learning_rate_cloud_and_recent_steps() -> None:
    run = run_of(1_200)
    figure = charts.draw(run, [], CAPTION)
    rate = panel(figure, "learning_rate")
    assert rate.get_yscale() == "log"
    np.testing.assert_array_equal(drawn(rate, "rate"), np.column_stack([run.step, run.learning_rate]))

    cloud = panel(figure, "cloud")
    np.testing.assert_array_equal(drawn(cloud, "cloud"), np.column_stack([100 * run.accuracy, run.loss]))
    np.testing.assert_array_equal(cloud.collections[0].get_array(), run.step)

    recent = panel(figure, "recent")
    np.testing.assert_array_equal(drawn(recent, "recent"), np.column_stack([run.step, run.loss])[-500:])
    np.testing.assert_allclose(drawn(recent, "mean")[:, 1], naive_centred(run.loss, 50)[-500:], rtol=1e-12)
    colours = recent.collections[0].get_facecolor()[:, :3]
    expected = [to_rgb(palette.domain_colour(run.domains[i])) for i in run.domain[-500:]]
    np.testing.assert_allclose(colours, expected)


def test_learning_rate_of_a_long_run_keeps_its_extremes() -> None:
    run = run_of(50_000, learning_rate={31_234: 5e-3, 31_300: 0.0})
    points = drawn(panel(charts.draw(run, [], CAPTION), "learning_rate"), "rate")
    assert len(points) <= 2 * drawing.LINE_POINTS + 100
    assert points[:, 1].max() == 5e-3
    assert 31_234 in points[:, 0] and points[-1, 0] == 49_999


def test_domains_as_dots_then_as_curves() -> None:
    run = run_of(60)
    ax = panel(charts.draw(run, [], CAPTION), "domains")
    means = {}
    for index, name in enumerate(run.domains):
        loss = run.loss[run.domain == index]
        np.testing.assert_array_equal(drawn(ax, name)[:, 0], loss)
        means[name], height = drawn(ax, f"mean {name}")[0]
        assert means[name] == pytest.approx(loss.mean())
        assert set(drawn(ax, name)[:, 1]) == {height}
    heights = [drawn(ax, f"mean {name}")[0, 1] for name in sorted(means, key=lambda name: means[name])]
    assert heights == sorted(heights), "the hardest domain is on top"

    run = run_of(900)
    ax = panel(charts.draw(run, [], CAPTION), "domains")
    for index, name in enumerate(run.domains):
        own = run.domain == index
        expected = np.column_stack([run.step[own], naive_centred(run.loss[own], 50)])
        np.testing.assert_allclose(drawn(ax, f"mean {name}"), expected, rtol=1e-12)
        last = run.loss[own][-50:].mean()
        assert f"{palette.domain_name(name)} {last:.2f} · {own.sum()}" in texts(ax, "end")


@pytest.mark.parametrize("steps", [0, 1, 2, 10])
def test_short_runs_render_without_a_warning(steps: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = charts.draw(run_of(steps), [], CAPTION)
        figure.canvas.draw()
    assert [ax.get_gid() for ax in figure.axes if ax.get_gid()] == [p.name for p in charts.PANELS]
    assert texts(panel(figure, "samples"), "empty") == ["no sample generated yet"]
    assert texts(panel(figure, "loss"), "empty") == ["no step yet"] * (steps == 0)


def test_headline_holds_the_numbers_of_now() -> None:
    run = run_of(300)
    numbers = {what: (number, how) for number, what, how in charts.headline(run, 600)}
    assert numbers["optimizer steps"] == ("300", "50 % of 600")
    assert numbers["loss, nats per token"][0] == f"{run.loss[-50:].mean():.3f}"
    assert numbers["next-token accuracy"][0] == f"{100 * run.accuracy[-50:].mean():.1f} %"
    assert numbers["tokens per second"][0] == f"{run.throughput[-50:].mean():,.0f}"
    assert numbers["prequential bits per byte"][0] == "2.000"
    assert numbers["tokens seen"][0] == "76.8k"
    figure = charts.draw(run, [], charts.Caption("A run", "", 600))
    assert {number for number, _ in numbers.values()} <= {text.get_text() for text in figure.texts}


@pytest.mark.parametrize("steps", [100, 5_000])
def test_non_finite_steps_are_marked_and_counted(steps: int) -> None:
    run = run_of(steps, loss={3: math.nan, 40: math.inf, 99: -math.inf})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = charts.draw(run, [], CAPTION)
        figure.canvas.draw()
    loss = panel(figure, "loss")
    marks = drawn(loss, "nonfinite")
    # Marks closer than two pixels share one.
    assert marks[0, 0] == 3 and len(marks) == 3 and set(marks[:, 1]) == {1.0}
    assert loss.get_title("right") == "3 non-finite steps"
    assert panel(figure, "domains").get_title("right") == "3 non-finite steps"
    assert texts(panel(figure, "cloud"), "note") == ["3 non-finite steps"]
    assert np.isfinite(drawn(loss, "mean")).all()
    assert not has(panel(figure, "accuracy"), "nonfinite")


def test_a_run_of_nothing_but_nan() -> None:
    run = run_of(30, loss=np.full(30, np.nan), accuracy=np.full(30, np.nan))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        charts.render(run, [], CAPTION)
    assert len(drawn(panel(charts.draw(run, [], CAPTION), "loss"), "nonfinite")) == 30
    assert charts.headline(run, 100)[1][0] == "—"


@pytest.mark.parametrize(("steps", "spike"), [(12, 60.0), (400, 1e30), (5_000, 60.0), (5_000, 1e30)])
def test_one_spike_does_not_flatten_the_curve(steps: int, spike: float) -> None:
    calm = panel(charts.draw(run_of(steps), [], CAPTION), "loss")
    run = run_of(steps, loss={7: spike})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = charts.draw(run, [], CAPTION)
        figure.canvas.draw()
    ax = panel(figure, "loss")
    assert ax.get_ylim()[1] < calm.get_ylim()[1] + 1
    np.testing.assert_array_equal(drawn(ax, "above")[:, 0], [7])
    assert ax.get_title("right") == "1 off the axis"
    assert texts(panel(figure, "cloud"), "note") == ["1 off the axis"]


def test_limits_keep_the_height_that_a_long_run_fell_from() -> None:
    loss = np.full(1_000_000, 3.0) + np.random.default_rng(0).normal(0, 0.3, 1_000_000)
    loss[:200] = 8.3
    low, high = drawing.robust_limits(loss)
    assert 8.3 < high < 9 and 0 <= low < 3


def test_a_million_rows_draw_a_bounded_number_of_points() -> None:
    run = run_of(1_000_000, loss={5: math.nan, 123_456: 1e6})
    figure = charts.draw(run, [], CAPTION)
    for ax in figure.axes:
        assert len(ax.get_children()) < 80
        assert all(len(line.get_xydata()) <= 2_500 for line in ax.lines)
        assert all(len(cloud.get_offsets()) <= drawing.CLOUD_POINTS for cloud in ax.collections)
        assert all(len(path.vertices) <= 2_500 for cloud in ax.collections for path in cloud.get_paths())
    loss = panel(figure, "loss")
    window = 1_000_000 // drawing.LINE_POINTS
    assert f"mean of {window:,} steps" in loss.get_ylabel(), "the label tells the window that the line has"
    points = drawn(loss, "mean")
    for step, mean in points[[0, 17, 300, -1]]:
        ahead = min(window - 1 - window // 2, int(step))
        around = run.loss[max(int(step) - window // 2, 0) : int(step) + ahead + 1]
        assert mean == pytest.approx(around[np.isfinite(around)].mean(), rel=1e-4)
    assert has(loss, "band") and not has(loss, "steps")
    assert drawn(loss, "above")[0, 0] == 123_456


def test_many_domains_are_counted_when_not_shown() -> None:
    run = run_of(400)
    run._store["domain"] = (np.arange(400) % 12).astype(np.int16)
    run.names["domain"] = [f"my own corpus, part {i}" for i in range(12)]
    ax = panel(charts.draw(run, [], CAPTION), "domains")
    assert ax.get_ylabel().endswith("3 rarer not shown") and len(set(texts(ax, "end"))) == 9


def test_ten_thousand_steps_keep_the_fifty_step_mean() -> None:
    run = run_of(10_000)
    loss = panel(charts.draw(run, [], CAPTION), "loss")
    assert "line: mean of 50 steps" in loss.get_ylabel()
    points = drawn(loss, "mean")
    expected = drawing.centred_mean(run.loss, 50)[points[:, 0].astype(int)]
    np.testing.assert_array_equal(points[:, 1], expected)
    assert points[-1, 0] == 9_999


def test_band_holds_the_quantiles_of_each_chunk() -> None:
    values = np.random.default_rng(1).normal(size=1_000)
    values[130] = np.nan
    ends, low, high = drawing.band(values, 10)
    assert ends.tolist() == list(range(99, 1_000, 100))
    for i in range(10):
        chunk = np.sort(values[100 * i : 100 * (i + 1)])
        chunk = chunk[np.isfinite(chunk)]
        assert low[i] == chunk[round(0.05 * (len(chunk) - 1))] and high[i] == chunk[round(0.95 * (len(chunk) - 1))]


def test_spread_keeps_order_distance_and_what_is_far_apart() -> None:
    placed = drawing.spread([0.5, 0.51, 0.0, 1.0, 0.5], gap=0.1)
    assert placed[2] == 0 and placed[3] == 1
    assert np.diff(np.sort(placed)).min() > 0.0999
    assert placed[0] < placed[4] < placed[1]
    assert drawing.spread([], 0.1).size == 0
    crowded = drawing.spread([0.9] * 9, gap=0.1)
    assert crowded.min() >= 0 and crowded.max() <= 1.0 + 1e-9


HOSTILE = [
    "costs $4 or $\\frac{1}{$ and \\begin{x} _^ %s {0}",
    "line one\nline two\r\n\ttabbed\x00\x07\x1b[31m",
    "שלום עולם مرحبا بالعالم \u202egnp.exe\u202c",
    "emoji 😀👩‍👩‍👧 日本語のテキスト ไทย \ufffd\ufffe \U000e0041",
    "lone \ud800 surrogate, zalgo z̷̢̛͓͎͖̮̗a̶, nbsp\u00a0\u2028\u2029",
    "x" * 100_000,
    "",
]


def test_hostile_samples_render_without_a_warning() -> None:
    run = run_of(20)
    run.names["domain"] = ["$\\frac{", "\n\u202e日本語" * 20, ""]
    caption = charts.Caption("$x_{\n" + "t" * 500, "日本 $" + "s" * 900, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for some in (HOSTILE[:5], HOSTILE[5:]):
            rows = [{"step": i, "input": text, "output": text[::-1], "accuracy": None} for i, text in enumerate(some)]
            charts.render(run, rows, caption)


def test_printable_text_is_one_line_of_glyphs_that_the_font_has() -> None:
    for text in HOSTILE:
        shown = drawing.printable(text)
        assert shown.isprintable() and len(shown) <= 4_000
        assert {ord(char) for char in shown} <= drawing._glyphs()
    assert drawing.printable("a\nb\tc") == "a ⏎ b c"
    assert drawing.printable("日本語のテキスト!") == "···!"


def test_a_sample_that_nobody_could_see_is_there_in_words() -> None:
    samples = [{"step": 1, "input": "a", "output": "", "accuracy": 0.0}]
    samples += [{"step": 2, "input": "a", "output": " \n" * 80, "accuracy": 0.0}]
    ax = panel(charts.draw(run_of(10), samples, CAPTION), "samples")
    assert texts(ax, "output 0") == ["(160 characters of white space)"]
    assert texts(ax, "output 1") == ["(end of text)"]


def test_the_table_shows_the_last_five_samples_newest_first() -> None:
    samples: list[dict[str, Any]] = [
        {"step": i, "input": f"in {i}", "output": f"out {i}", "accuracy": i / 10} for i in range(8)
    ]
    samples[7] = {"step": 7_000, "input": "word " * 200, "error": "out of memory", "output": "", "accuracy": None}
    ax = panel(charts.draw(run_of(10), samples, CAPTION), "samples")
    assert [texts(ax, f"step {row}") for row in range(5)] == [["7,000"], ["6"], ["5"], ["4"], ["3"]]
    assert texts(ax, "output 0") == ["failed: out of memory"] and texts(ax, "accuracy 0") == ["—"]
    assert texts(ax, "input 1") == ["in 6"] and texts(ax, "accuracy 1") == ["60.0 %"]
    long = texts(ax, "input 0")[0]
    assert long.count("\n") == 1 and long.endswith("…")


def test_texts_of_the_table_stay_in_their_columns() -> None:
    wide = [{"step": 10**8, "input": "W" * 900, "output": "M" * 900, "accuracy": 1.0} for _ in range(5)]
    figure = charts.draw(run_of(10), wide, CAPTION)
    figure.canvas.draw()
    ax = panel(figure, "samples")
    boxes = {text.get_gid(): text.get_window_extent() for text in ax.texts}
    for row in range(5):
        names = [f"{column} {row}" for column in ("step", "input", "output", "accuracy")]
        for before, after in itertools.pairwise(names):
            assert boxes[before].x1 < boxes[after].x0
    assert boxes["input 4"].y0 > 0 and boxes["accuracy 0"].x1 < 2_000


@pytest.mark.parametrize("steps", [10, 100, 40_000])
def test_no_text_overlaps_another(steps: int) -> None:
    bad = {5: math.nan, 8: 90.0} if steps > 10 else {}
    rows = [{"step": i, "input": "some text " * 30, "output": "other text " * 30, "accuracy": 0.1} for i in range(5)]
    figure = charts.draw(run_of(steps, loss=bad), rows, CAPTION)
    figure.canvas.draw()
    found = [t for ax in figure.axes for t in (*ax.texts, ax.title, ax._left_title, ax._right_title)]
    for ax in figure.axes:
        found += [ax.xaxis.label, ax.yaxis.label] if ax.axison else []
        for axis in (ax.xaxis, ax.yaxis) if ax.axison else ():
            low, high = axis.get_view_interval()  # ticks outside are not drawn
            found += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    shown = [(t.get_text(), t.get_window_extent()) for t in (*figure.texts, *found) if t.get_text() and t.get_visible()]
    assert len(shown) > 60
    for index, (text, box) in enumerate(shown):
        assert min(box.x0, box.y0) >= 0 and box.x1 <= 2_000 and box.y1 <= 1_400, text
        for other, against in shown[index + 1 :]:
            # Boxes hold a line's full height: touching ones do not touch in ink.
            apart = box.x1 <= against.x0 or against.x1 <= box.x0 or box.y1 <= against.y0 + 4 or against.y1 <= box.y0 + 4
            assert apart, f"{text!r} lies on {other!r}"


def test_write_makes_the_numbered_and_the_latest_picture(tmp_path: Path) -> None:
    charts.write(tmp_path, run_of(3), [], CAPTION)
    path = charts.write(tmp_path, run_of(12), [], CAPTION)
    assert path == tmp_path / "training_step_000012.png"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "training_latest.png",
        "training_step_000003.png",
        "training_step_000012.png",
    ]
    content = path.read_bytes()
    assert content == (tmp_path / "training_latest.png").read_bytes() == charts.render(run_of(12), [], CAPTION)
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        assert image.format == "PNG" and image.size == (2_000, 1_400)


def test_drawing_leaves_matplotlib_as_it_was() -> None:
    code = (
        "import sys, matplotlib; before = matplotlib.rcParams.copy();"
        "from slimpajama_hf.views import charts; from slimpajama_hf.record import columns;"
        "charts.render(columns.Columns(), [], charts.Caption('', '', 0));"
        "assert matplotlib.rcParams.copy() == before;"
        "assert not {'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_domain_colours_are_fixed_and_readable() -> None:
    known = [palette.domain_colour(name) for name in palette.DOMAIN_COLOURS]
    assert len(set(known)) == len(known)
    assert palette.domain_colour("my corpus") == "#386CA1"
    assert palette.domain_colour("my corpus") != palette.domain_colour("my corpus 2")
    for colour in (*known, palette.domain_colour("")):
        dark = palette._luminance(palette._rgb(palette.text_colour(colour))) + 0.05
        assert (palette._luminance(palette._rgb(palette.PAPER)) + 0.05) / dark >= 4.5


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "no_such_backend"])
def test_the_backend_of_a_notebook_stops_no_chart(finished, tmp_path, backend):
    """MPLBACKEND as Colab sets it for all that is started from it, in a Python that does not have that backend."""
    run = Path(shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*", "*.png")))
    for words in (["views", str(run)], ["compare", str(run), str(finished), "--output", str(tmp_path / "both.png")]):
        done = run_command(*words, MPLBACKEND=backend)
        assert done.returncode == 0, done.stderr
    assert (run / "training_viz/training_latest.png").is_file() and (tmp_path / "both.png").is_file()


@pytest.mark.slow
def test_a_run_draws_under_a_foreign_backend_and_the_summary_names_what_is_there_alone(shards, tmp_path):
    flags = [
        *NANO,
        "--dataset",
        f"{shards}/*.jsonl.zst",
        "--max_steps",
        "2",
        "--max_seq_length",
        "16",
        "--no-checkpoint",
    ]
    run = tmp_path / "run"
    done = run_script(*flags, "--output_dir", str(run), MPLBACKEND="module://matplotlib_inline.backend_inline")
    assert done.returncode == 0 and "not drawn" not in done.stderr, done.stderr
    named = re.findall(r"^ +(chart|report|metrics|samples|ledger)  (.*)$", done.stderr, re.M)
    assert [name for name, _ in named] == ["chart", "report", "metrics", "samples", "ledger"]
    assert all(Path(path).is_file() for _, path in named)
    # What stands in the way of the views: none of them is drawn, and none is promised.
    other = tmp_path / "other"
    assert run_script(*flags[:-1], "--output_dir", str(other)).returncode == 0
    shutil.rmtree(other / "training_viz")
    (other / "report.html").unlink()
    (other / "training_viz/metrics_history.json/in the way").mkdir(parents=True)
    done = run_script("--output_dir", str(other), "--resume_from_checkpoint", "true", "--max_steps", "3")
    assert done.returncode == 1 and "error: the final chart was not drawn" in done.stderr, done.stderr
    assert f"type python -m slimpajama_hf views {other}" in done.stderr
    named = re.findall(r"^ +(chart|report|metrics|samples|ledger)  (.*)$", done.stderr, re.M)
    assert [name for name, _ in named] == ["ledger"]
