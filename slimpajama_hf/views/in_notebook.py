"""A run as HTML for a notebook; its text has the page's own colour, light or dark."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable
from typing import Any

from slimpajama_hf import palette, screen
from slimpajama_hf.record.columns import mean_of_last, read_columns
from slimpajama_hf.record.run_folder import RunFolder
from slimpajama_hf.views import views

#: Steps in the means of loss and accuracy.
WINDOW = 50

_NAME = "opacity:.65;font-size:12px"
_VALUE = "font-size:18px;font-weight:600;font-variant-numeric:tabular-nums"


def figures(pairs: Iterable[tuple[str, str]]) -> str:
    """Names with their values, side by side."""
    cells = "".join(
        f'<div><div style="{_NAME}">{html.escape(name)}</div><div style="{_VALUE}">{html.escape(value)}</div></div>'
        for name, value in pairs
    )
    return f'<div style="display:flex;flex-wrap:wrap;gap:6px 32px;margin:8px 0">{cells}</div>'


def progress(done: int, total: int, pairs: Iterable[tuple[str, str]]) -> str:
    """A progress bar of `total` steps, with numbers below it."""
    percent = 100 * done / max(total, 1)
    bar = f'<div style="width:{percent:.1f}%;height:100%;border-radius:4px;background:{palette.ACCENT}"></div>'
    return (
        f'<div style="max-width:860px"><div style="display:flex;justify-content:space-between;{_NAME}">'
        f"<span>Training: {done:,} of {total:,} steps</span><span>{percent:.0f}%</span></div>"
        f'<div style="height:8px;border-radius:4px;margin-top:4px;background:rgb(128 128 128 / 25%)">{bar}</div>'
        f"{figures(pairs)}</div>"
    )


def of_run(folder: RunFolder, record: dict[str, Any]) -> str:
    """A stored run: its title, its numbers, its newest chart, and the command for the full report."""
    rows = read_columns(folder.ledger) if folder.ledger.exists() else None
    title, subtitle = views.caption_of(record)
    pairs = [("steps", "0")]
    if rows is not None and len(rows):
        last = min(WINDOW, len(rows))
        pairs = [
            ("steps", f"{len(rows):,}"),
            (f"loss, last {last}", f"{mean_of_last(rows.loss, WINDOW):.4f}"),
            (f"accuracy, last {last}", f"{mean_of_last(rows.accuracy, WINDOW):.1%}"),
            ("bits per byte so far", f"{rows.prequential_bits_per_byte():.3f}"),
            ("tokens", f"{int(rows.tokens.sum()):,}"),
            ("training time", screen.format_time(float(rows.step_seconds.sum()))),
        ]
    picture = '<div style="opacity:.65">No chart was drawn yet.</div>'
    if folder.latest_chart.is_file():
        data = base64.b64encode(folder.latest_chart.read_bytes()).decode()
        picture = f'<img alt="chart of the run" style="max-width:100%" src="data:image/png;base64,{data}">'
    command = f"python -m slimpajama_hf report {folder.path}"
    return (
        f'<div><div style="font-size:20px;font-weight:600">{html.escape(title)}</div>'
        f'<div style="opacity:.65">{html.escape(subtitle)}</div>{figures(pairs)}{picture}'
        f'<div style="{_NAME};margin-top:6px">All of it: <code>{html.escape(command)}</code></div></div>'
    )
