"""The report of a run: one HTML file that opens from disk, with everything that the run's folder has.

`write(folder)` makes `RUN/report.html`; `watch.serve(folders, ...)` shows it in a browser while the run is training.
Nothing here imports torch: the report is made from files.
"""

from __future__ import annotations

from slimpajama_hf.report.page import write as write
