"""Pages of the live server besides the report: of a run that has not begun, and of several runs."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from typing import Any

from slimpajama_hf.report import page

_SCRIPTS = ("uplot/uPlot.iife.min.js", "format.js", "several.js")


def waiting(name: str) -> dict[str, Any]:
    """The `meta` for `page.render` if nothing of a run has been written yet."""
    nothing = ("loss", "accuracy", "bits_per_byte", "throughput", "noise_scale")
    return {
        "title": name,
        "subtitle": "the run has not begun yet",
        "steps": 0,
        "max_steps": None,
        "headline": dict.fromkeys(nothing)
        | {"samples": 0, "tokens": 0, "text_bytes": 0, "seconds": 0.0, "recent_steps": 0},
        "evaluations": [],
    }


def several_runs(names: Sequence[str], differences: list[list[Any]]) -> str:
    """The page of several runs; their numbers come as events. `differences`: see `several.differences`."""
    data = json.dumps({"names": list(names), "differences": differences})
    parts = {
        "title": html.escape(f"{len(names)} runs"),
        "data": base64.b64encode(data.encode("utf-8", "surrogatepass")).decode(),
    }
    return page.filled("several.html", _SCRIPTS, parts, asks_server=True)
