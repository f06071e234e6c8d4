"""Makes the one file of the report from the assets in this folder and the content of a run; it needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slimpajama_hf import files
from slimpajama_hf.record.columns import Reader
from slimpajama_hf.record.run_folder import RunFolder
from slimpajama_hf.report import content, documents
from slimpajama_hf.report.packing import pack

FILE_NAME = "report.html"

_ASSETS = Path(__file__).parent / "assets"
#: The scripts are joined in this order; each may use those before it.
_LIBRARY = "uplot/uPlot.iife.min.js"
_SCRIPTS = (_LIBRARY, "data.js", "format.js", "chart.js", "document.js", "panels.js", "live.js", "main.js")
_STYLES = ("uplot/uPlot.min.css", "page.css", "live.css")


def write(folder: Path) -> Path:
    """Write `report.html` into the folder of a run and return its path; replaces an old one as a whole or not at all.

    The report of an old, torn or young run says what is missing. Raises UserError if there is no run in the folder,
    OSError if the disk is full.
    """
    run = RunFolder(Path(folder))
    packed, meta = packed_content(run, Reader(run.ledger))
    path = run.path / FILE_NAME
    files.write_whole(path, render(meta, packed))
    return path


def packed_content(run: RunFolder, reader: Reader) -> tuple[bytes, dict[str, Any]]:
    """The content of a run as packed by `packing.pack`, and its JSON part; with fewer passports if it is too big."""
    most = documents.MOST_PASSPORTS + 24
    while True:
        meta, arrays = content.gather(run, reader, most)
        packed = pack(meta, arrays)
        if len(packed) <= content.MOST_BYTES or most < 10:
            return packed, meta
        most //= 2


def render(meta: dict[str, Any], packed: bytes | None, watch: str = "no") -> str:
    """The page. `packed` None: the page gets its content from the server that it came from. Then `watch` is `yes`, or
    `several` if that server also has a page of several runs.

    Texts of documents are only in the packed content, never in the HTML.
    """
    parts = {
        "title": html.escape(meta["title"]),
        "subtitle": html.escape(meta["subtitle"]),
        "held_out": _held_out(meta["evaluations"]),
        "figures": _figures(meta),
        "watch": watch,
        "data": base64.b64encode(packed).decode() if packed is not None else "",
    }
    return filled("page.html", _SCRIPTS, parts, asks_server=watch != "no")


def filled(template: str, scripts: Sequence[str], parts: dict[str, str], asks_server: bool) -> str:
    """A template with its placeholders replaced by `parts`, `policy`, `style` and `script`.

    The content security policy permits only this script, and connections only to the page's own server, if
    `asks_server`.
    """
    script = "\n".join((_ASSETS / name).read_text(encoding="utf-8") for name in scripts)
    licence = (_ASSETS / "uplot" / "LICENSE").read_text(encoding="utf-8")
    script = f'"use strict";\n/* uPlot:\n{licence}*/\n(() => {{\n{script}\n}})();\n'
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode()
    connections = "'self'" if asks_server else "'none'"
    parts = parts | {
        "policy": f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'; "
        f"connect-src {connections}; base-uri 'none'; form-action 'none'",
        "style": "".join((_ASSETS / name).read_text(encoding="utf-8") for name in _STYLES),
        "script": script,
    }
    page = (_ASSETS / template).read_text(encoding="utf-8")
    # One pass over the template: inserted text is not searched for placeholders.
    pieces = page.split("{{")
    return pieces[0] + "".join(parts[name] + rest for name, rest in (piece.split("}}", 1) for piece in pieces[1:]))


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form).replace("%", " %")


def _held_out(evaluations: list[dict[str, Any]]) -> str:
    """The newest held-out scores, of the weights and of their average; without scores, a sentence."""
    newest = evaluations[-1] if evaluations else {}
    rows = ""
    for name, words, scores in (("raw", "weights", newest), ("averaged", "averaged weights", newest.get("averaged"))):
        cells = "".join(
            f'<td><b id="held-out-{name}-{score}">{_shown((scores or {}).get(score), form)}</b></td>'
            for score, form in (("loss", ".3f"), ("accuracy", ".1%"), ("bits_per_byte", ".3f"))
        )
        rows += f'<tr id="held-out-{name}"{"" if scores else " hidden"}><th scope="row">{words}</th>{cells}</tr>'
    documents = f"{newest['documents']:,}" if newest.get("documents") else "The"
    updates = f"{newest.get('step', 0):,} update{'' if newest.get('step') == 1 else 's'}"
    return (
        f'<section class="held-out" id="held-out" aria-labelledby="held-out-title"{"" if newest else " hidden"}>'
        '<div><h2 id="held-out-title">Held out</h2>'
        f'<p id="held-out-note">{documents} documents that no step learns, scored after {updates}.</p></div>'
        '<table><thead><tr><td></td><th scope="col">loss<small>nats per token</small></th>'
        '<th scope="col">accuracy<small>of next tokens</small></th>'
        '<th scope="col">bits per byte<small>of text</small></th></tr></thead>'
        f"<tbody>{rows}</tbody></table></section>"
        f'<p class="note" id="no-held-out"{" hidden" if newest else ""}>'
        "No held-out document was scored in this run yet: <code>--eval_steps N</code> does this every N "
        "steps. The numbers below are of documents just before they were learned.</p>"
    )


def _figures(meta: dict[str, Any]) -> str:
    """The headline numbers as HTML, so that they are there at once, and without a script."""
    head, steps = meta["headline"], meta["steps"]
    last = f"last {min(head['recent_steps'], steps)} steps" if steps > 1 else "one step"
    goal = "one document each" if head["samples"] == steps else f"{head['samples']:,} documents"
    if meta["max_steps"] and meta["max_steps"] != steps:
        goal = f"of {meta['max_steps']:,}"
    figures = [
        ("steps", f"{steps:,}", goal),
        ("loss", _shown(head["loss"], ".3f"), f"nats per token, {last}"),
        ("accuracy", _shown(head["accuracy"], ".1%"), f"of next tokens, {last}"),
        ("bits per byte", _shown(head["bits_per_byte"], ".3f"), "prequential, the whole run"),
        ("tokens", _short(head["tokens"]), f"{_short(head['text_bytes'])}B of text"),
        ("training time", _duration(head["seconds"]), f"{_shown(head['throughput'], ',.0f')} tokens per second"),
    ]
    noise = head["noise_scale"]
    wide = f'<div class="wide"><dt>noise scale</dt><dd><span>{html.escape(noise)}</span></dd></div>' if noise else ""
    cells = "".join(
        f'<div><dt>{html.escape(name)}</dt><dd><b id="figure-{name.replace(" ", "-")}">{html.escape(value)}</b>'
        f"<span>{html.escape(note)}</span></dd></div>"
        for name, value, note in figures
    )
    return cells + wide


def _short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:,.0f} "


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    if seconds < 6000:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:,.1f} h"
