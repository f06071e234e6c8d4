"""The report of a run: one HTML file that opens from disk, with everything that its folder knows.

`write(folder)` makes `RUN/report.html`; `watch.serve(folder)` shows it in a browser while the run is on. Nothing here
imports torch: the report is a view of files.
"""

from __future__ import annotations

from slimpajama_hf.report.page import write as write
