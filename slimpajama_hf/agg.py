"""matplotlib, whatever backend MPLBACKEND asks for: nothing else here imports it first.

Our figures are drawn by Agg, without a backend. But matplotlib reads the variable as it is imported, and refuses to be
where it names one that is not installed, as Colab's does (`module://matplotlib_inline.backend_inline`) for a Python
that is not the notebook's own.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

__all__ = ["Figure", "FigureCanvasAgg", "matplotlib"]


@contextlib.contextmanager
def _no_backend_asked() -> Iterator[None]:
    asked = os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ["MPLBACKEND"] = asked
    if asked:
        # What a notebook plots beside us goes where it would have gone.
        with contextlib.suppress(ValueError, ImportError):
            matplotlib.rcParams["backend"] = asked


with _no_backend_asked():
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
