"""Import matplotlib, whatever backend MPLBACKEND names. Every module that draws imports this one first.

We draw with Agg and need no backend. But matplotlib reads MPLBACKEND when it is imported, and the import fails if that
backend is not installed. Colab names one (`module://matplotlib_inline.backend_inline`) that only the Python of its
notebooks has.
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
        # The user's own plots in the same notebook still use the backend that MPLBACKEND names.
        with contextlib.suppress(ValueError, ImportError):
            matplotlib.rcParams["backend"] = asked


with _no_backend_asked():
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
