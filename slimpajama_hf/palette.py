"""Colours and short names of domains, and the inks of the charts: one place, so that every view agrees."""

from __future__ import annotations

import colorsys
import hashlib

# Inks of the charts, from loudest to quietest. All are `#rrggbb`.
INK = "#1F2328"  # titles, numbers
MUTED = "#5F666D"  # units, explanations, tick labels: 5.6:1 on PAPER
GRID = "#E3E1DA"  # grid lines, empty part of the progress bar
PAPER = "#FCFBF8"  # background
ACCENT = "#1B4B7A"  # the running mean, the number that matters
POINT = "#8DA9C4"  # single steps behind the mean, and their band
ALARM = "#B3261E"  # what is not finite, what failed

# Okabe & Ito, "Color Universal Design" (https://jfly.uni-koeln.de/color/), and Paul Tol, "Colour Schemes",
# scheme "muted" (https://personal.sron.nl/~pault/). Readers with deutan, protan and tritan vision can tell the seven of
# SlimPajama apart too (CIE76 distance of at least 16, simulated after Machado et al. 2009), also the four of
# the embedded corpus. The two corpora never share a run.
DOMAIN_COLOURS = {
    "RedPajamaCommonCrawl": "#0072B2",  # Okabe-Ito blue
    "RedPajamaC4": "#56B4E9",  # Okabe-Ito sky blue: the web again, hence blue again
    "RedPajamaGithub": "#009E73",  # Okabe-Ito bluish green
    "RedPajamaBook": "#E69F00",  # Okabe-Ito orange
    "RedPajamaArXiv": "#D55E00",  # Okabe-Ito vermillion
    "RedPajamaWikipedia": "#882255",  # Tol wine; Okabe-Ito's yellow would vanish on white
    "RedPajamaStackExchange": "#CC79A7",  # Okabe-Ito reddish purple
    "PythonFunction": "#332288",  # Tol indigo
    "PythonClass": "#44AA99",  # Tol teal
    "PythonDocstring": "#999933",  # Tol olive
    "PythonTopic": "#AA4499",  # Tol purple
    "unknown": "#8A8F94",
}

DOMAIN_NAMES = {
    "RedPajamaCommonCrawl": "CommonCrawl",
    "RedPajamaC4": "C4",
    "RedPajamaGithub": "GitHub",
    "RedPajamaBook": "Books",
    "RedPajamaArXiv": "arXiv",
    "RedPajamaWikipedia": "Wikipedia",
    "RedPajamaStackExchange": "StackExchange",
    "PythonFunction": "functions",
    "PythonClass": "classes",
    "PythonDocstring": "docstrings",
    "PythonTopic": "topics",
    "unknown": "unknown",
}


def domain_colour(domain: str) -> str:
    """The colour `#rrggbb` of a domain: the table's, or one derived from the name alone (same in every process)."""
    if domain in DOMAIN_COLOURS:
        return DOMAIN_COLOURS[domain]
    digest = hashlib.sha256(domain.encode("utf-8", "surrogatepass")).digest()
    # Hue from the whole circle; lightness and saturation from bands that stay readable on PAPER.
    hue = int.from_bytes(digest[:2], "big") / 65536
    rgb = colorsys.hls_to_rgb(hue, 0.36 + 0.16 * digest[2] / 255, 0.45 + 0.35 * digest[3] / 255)
    return _hex(rgb)


def domain_name(domain: str) -> str:
    """The short name to show for a domain. A domain without one keeps its own name."""
    return DOMAIN_NAMES.get(domain, domain)


def text_colour(colour: str, contrast: float = 4.5) -> str:
    """`colour` darkened, hue kept, until text in it stands out from PAPER by `contrast` (WCAG 2 ratio)."""
    rgb = _rgb(colour)
    paper = _luminance(_rgb(PAPER))
    # Compare the colour as it will be written, with channels rounded to 256 values.
    while (paper + 0.05) / (_luminance(_rgb(_hex(rgb))) + 0.05) < contrast:
        rgb = (rgb[0] * 0.96, rgb[1] * 0.96, rgb[2] * 0.96)
    return _hex(rgb)


def _rgb(colour: str) -> tuple[float, float, float]:
    return int(colour[1:3], 16) / 255, int(colour[3:5], 16) / 255, int(colour[5:7], 16) / 255


def _hex(rgb: tuple[float, float, float]) -> str:
    return "#" + "".join(f"{round(255 * channel):02X}" for channel in rgb)


def _luminance(rgb: tuple[float, float, float]) -> float:
    """Relative luminance of an sRGB colour, 0 (black) to 1 (white), by WCAG 2."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
