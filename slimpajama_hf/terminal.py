"""Show foreign text on a terminal: first made harmless, then coloured. Also the tables beside it.

`rich` is imported only when something is drawn, so that `--help` stays fast.
"""

from __future__ import annotations

import math
import os
import unicodedata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

#: (surprisal in nats up to which a style holds, style). Each style has a background and an ink, so that it reads the
#: same on dark and light terminals (ColorBrewer YlOrRd). Tokens that the model knew keep the terminal's own colours.
SURPRISAL_STYLES: tuple[tuple[float, str], ...] = (
    (1.0, ""),
    (2.0, "#000000 on #FFF3B0"),
    (4.0, "#000000 on #FECC5C"),
    (6.0, "#000000 on #FD8D3C"),
    (8.0, "#FFFFFF on #D7301F"),
    (math.inf, "#FFFFFF on #7F0000"),
)

#: Columns without a terminal and without $COLUMNS: lines that go into a pipe are not broken.
PIPE_COLUMNS = 10_000

#: Colours of a surprisal that went down or up.
LESS, MORE = "green", "red"


def console() -> Console:
    """Standard output, with colours where it is a terminal and NO_COLOR is not set."""
    from rich.console import Console

    drawn = Console(highlight=False, markup=False, emoji=False)
    if not drawn.is_terminal and "COLUMNS" not in os.environ:
        drawn.width = PIPE_COLUMNS
    return drawn


def has_colours(drawn: Console) -> bool:
    """Whether the console shows colours."""
    return drawn.is_terminal and drawn.color_system is not None and not drawn.no_color


def written(text: str) -> str:
    """`text` of a document or a model, or a description of it if there is nothing to see."""
    if not text:
        return "(end of text)"
    return f"({len(text)} characters of white space)" if text.isspace() else text


def visible(text: str, line_ends: bool = True) -> str:
    """`text` with all that steers a terminal or hides made visible: controls as pictures (␛), marks of direction or
    without width as ‹U+202E›, tabs as →, line ends as ⏎ (followed by the line end with `line_ends`)."""
    shown = []
    for char in text:
        code = ord(char)
        if char == "\n":
            shown.append("⏎\n" if line_ends else "⏎")
        elif char == "\t":
            shown.append("→")
        elif code < 0x20:
            shown.append(chr(0x2400 + code))
        elif code == 0x7F:
            shown.append("␡")
        elif unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
            shown.append(f"‹U+{code:04X}›")
        else:
            shown.append(char)
    return "".join(shown)


def surprisal_style(nats: float) -> str:
    """The style of a token with this surprisal in nats; none for NaN."""
    if math.isnan(nats):
        return ""
    return next(style for most, style in SURPRISAL_STYLES if nats < most or most == math.inf)


def legend() -> Text:
    """What the colours of surprisal mean."""
    from rich.text import Text

    line, low = Text("nats:"), 0.0
    for most, style in SURPRISAL_STYLES:
        line.append(" ")
        line.append(f" {low:g}–{most:g} " if math.isfinite(most) else f" {low:g} and more ", style)
        low = most
    return line


def grid(*columns: dict[str, Any]) -> Table:
    """A table without lines; each column is what `rich.table.Table.add_column` takes."""
    from rich.table import Table

    headed = any("header" in column for column in columns)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", show_header=headed)
    for column in columns:
        table.add_column(**column)
    return table


def number(value: float | None, form: str = ".4f", missing: str = "—") -> str:
    """Format a number, or return a dash if there is none."""
    return missing if value is None or not math.isfinite(value) else format(value, form)
