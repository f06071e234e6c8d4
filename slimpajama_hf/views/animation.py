"""A run as a short animation (`report RUN --animate`): growing curves of loss and accuracy, and what the model writes.

It uses the parts of the charts, and only the ledger, `prompts.jsonl` and `samples.jsonl`.
"""

from __future__ import annotations

import bisect
import io
from pathlib import Path
from typing import Any

import numpy as np

from slimpajama_hf.agg import Figure, FigureCanvasAgg, matplotlib

# isort: split
from typing import TYPE_CHECKING

from matplotlib.lines import Line2D
from PIL import Image

from slimpajama_hf import files, palette
from slimpajama_hf.errors import UserError
from slimpajama_hf.record import columns
from slimpajama_hf.record.run_folder import RunFolder
from slimpajama_hf.views import charts, drawing, views

if TYPE_CHECKING:
    from slimpajama_hf.record.columns import Columns


FILE_NAME = "training.gif"

FRAMES = 48
FRAME_MILLISECONDS = 140
LAST_FRAME_MILLISECONDS = 4_000
#: Colours per frame: anti-aliased text needs several, and each costs bytes.
COLOURS = 48

SIZE = (9.6, 5.8)  # inches
MARGIN = 0.4  # inches
TEXTS_SHOWN = 3
OPENING_CHARACTERS = 40


def frame_steps(steps: int, frames: int = FRAMES) -> list[int]:
    """Finished steps at each frame, ascending up to `steps`; dense at the beginning, where a run changes fastest."""
    shown = np.linspace(0, 1, frames) ** 2 * (steps - 1) + 1
    return sorted({round(float(each)) for each in shown})


def written_at(entries: list[dict[str, Any]], step: int) -> dict[str, Any] | None:
    """The last of `entries` (ascending by `step`) that is not after `step`; None if there is none."""
    place = bisect.bisect_right([entry["step"] for entry in entries], step)
    return entries[place - 1] if place else None


def draw(
    whole: Columns, done: int, prompts: list[dict[str, Any]], samples: list[dict[str, Any]], caption: charts.Caption
) -> Figure:
    """The frame after `done` steps. Its axes are those of the `whole` run, so that they do not move between frames."""
    columns = whole.first(done)
    width, height = SIZE
    with matplotlib.rc_context(drawing.STYLE):
        figure = Figure(figsize=SIZE, dpi=drawing.DPI)
        FigureCanvasAgg(figure)
        numbers = charts.headline(columns, caption.max_steps)[:4]
        figure.text(
            MARGIN / width, 1 - 0.42 / height, drawing.printable(caption.title)[:60], fontsize=17, weight="bold"
        )
        for index, (number, what, _) in enumerate(numbers):
            x = MARGIN / width + (1 - 2 * MARGIN / width) * index / len(numbers)
            figure.text(x, 1 - 0.98 / height, number, fontsize=22, color=palette.ACCENT)
            figure.text(x, 1 - 1.22 / height, what, fontsize=10.5, color=palette.MUTED)
        share = done / len(whole)
        for end, colour in ((1.0, palette.GRID), (share, palette.ACCENT)):
            x_end = MARGIN / width + end * (1 - 2 * MARGIN / width)
            y = 1 - 1.38 / height
            figure.add_artist(Line2D((MARGIN / width, x_end), (y, y), color=colour, lw=3, solid_capstyle="butt"))
        bottom, plot = 2.15, 1.62
        half = (width - 2 * MARGIN) / 2
        series = (("Loss, nats per token", whole.loss, columns.loss, False),
                  ("Next-token accuracy, %", 100 * whole.accuracy, 100 * columns.accuracy, True))  # fmt: skip
        for index, (title, everything, values, floor) in enumerate(series):
            left = MARGIN + index * half + 0.3
            box = (left / width, bottom / height, (half - 0.55) / width, plot / height)
            ax = figure.add_axes(box)
            ax.grid(axis="y", color=palette.GRID, lw=0.9)
            ax.tick_params(length=0, labelsize=10, labelcolor=palette.MUTED, pad=4)
            drawing.draw_steps(ax, columns.step, values)
            drawing.draw_mean(ax, columns.step, values, max(drawing.WINDOW, len(whole) // drawing.LINE_POINTS))
            low, high = drawing.robust_limits(everything)
            ax.set_ylim(0 if floor else low, high)
            drawing.step_axis(ax, whole.step)
            drawing.number_axis(ax, "y", "")
            ax.set_xlabel("")
            ax.set_title(title, loc="left", fontsize=12.5, weight="bold", pad=6)
        _draw_text(figure, done, prompts, samples)
    return figure


def _draw_text(figure: Figure, done: int, prompts: list[dict[str, Any]], samples: list[dict[str, Any]]) -> None:
    width, height = SIZE
    written, sample = written_at(prompts, done), written_at(samples, done)
    if written is not None:
        step, texts = written["step"], [(each["prompt"], each["output"]) for each in written["texts"]]
    elif sample is not None:
        step, texts = sample["step"], [(sample.get("input", ""), sample.get("output") or "")]
    else:
        return
    left, top = MARGIN / width, 1.75
    figure.add_artist(Line2D((left, 1 - left), (top / height,) * 2, color=palette.GRID, lw=1))
    figure.text(left, (top - 0.32) / height, f"what it writes, at step {step:,}", fontsize=12.5, weight="bold")
    for line, (opening, output) in enumerate(texts[:TEXTS_SHOWN]):
        y = (top - 0.72 - 0.36 * line) / height
        opening = drawing.printable(opening)[-OPENING_CHARACTERS:]
        begins = MARGIN + len(opening) * drawing.CHARACTER
        # Cut at any character: a word of 60 characters would otherwise be left out as a whole.
        output = drawing.printable(output)[: int((width - MARGIN - begins) / drawing.CHARACTER)]
        figure.text(left, y, opening, family=drawing.MONO, color=palette.MUTED)
        figure.text(begins / width, y, output, family=drawing.MONO)


def _pixels(figure: Figure) -> Image.Image:
    content = io.BytesIO()
    with matplotlib.rc_context(drawing.STYLE):
        figure.savefig(
            content, format="png", dpi=drawing.DPI, facecolor=palette.PAPER, pil_kwargs={"compress_level": 1}
        )
    return Image.open(content).convert("RGB")


def write(folder: Path) -> Path:
    """Write `training.gif` into the folder of a run and return its path. Raises UserError for a run without steps."""
    run = RunFolder(folder)
    whole = columns.read_columns(run.ledger)
    if not len(whole):
        raise UserError(f"{folder}: no step in its ledger; there is nothing to animate yet")
    record = run.read_record()
    caption = charts.Caption(*views.caption_of(record), max_steps=record["max_steps"])
    prompts, samples = views.read_samples(run.prompts, ("texts",)), views.read_samples(run.samples)
    pictures = [_pixels(draw(whole, done, prompts, samples, caption)) for done in frame_steps(len(whole))]
    # One palette for all frames avoids flicker. It is from the middle and the last frame, for both dots and band.
    both = Image.new("RGB", (pictures[-1].width, 2 * pictures[-1].height))
    both.paste(pictures[len(pictures) // 2], (0, 0))
    both.paste(pictures[-1], (0, pictures[-1].height))
    colours = both.quantize(COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    frames = [picture.quantize(palette=colours, dither=Image.Dither.NONE) for picture in pictures]
    content = io.BytesIO()
    frames[0].save(
        content, format="GIF", save_all=True, append_images=frames[1:], loop=0, optimize=False, disposal=1,
        duration=[*[FRAME_MILLISECONDS] * (len(frames) - 1), LAST_FRAME_MILLISECONDS],
    )  # fmt: skip
    path = run.path / FILE_NAME
    files.write_whole(path, content.getvalue())
    return path
