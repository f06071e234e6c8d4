"""A run in a notebook: a real notebook, executed by nbclient in a real kernel."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from slimpajama_hf.lookback.run import Run
from tests.conftest import NANO, ROOT


@pytest.mark.long
def test_bar_and_chart_are_redrawn_in_place_and_a_run_shows_itself(shards, tmp_path, monkeypatch):
    for name, value in {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "IPYTHONDIR": str(tmp_path),
        "JUPYTER_PLATFORM_DIRS": "0",
    }.items():
        monkeypatch.setenv(name, value)
    flags = [*NANO, "--dataset", f"{shards}/*.jsonl.zst", "--max_seq_length", "32", "--max_steps", "40", "--warmup_steps", "10",
             "--viz_interval", "20", "--display_samples", "20", "--output_dir", str(tmp_path / "run")]  # fmt: skip
    cells = [
        f"import run_clm_slimpajama; run_clm_slimpajama.main({flags!r})",
        f"from slimpajama_hf.lookback.run import Run; Run({str(tmp_path / 'run')!r})",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    updates: list[dict[str, Any]] = []
    client = NotebookClient(notebook, timeout=250, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}})
    heard = client.process_message

    def process_message(message: Any, *more: Any) -> Any:
        if message["msg_type"] == "update_display_data":
            updates.append(message["content"])
        return heard(message, *more)

    monkeypatch.setattr(client, "process_message", process_message)
    client.execute()
    trained, shown = (cell["outputs"] for cell in notebook.cells)

    bar, chart = [output for output in trained if output["output_type"] == "display_data"]
    assert "40 of 40 steps" in bar["data"]["text/html"]
    assert (
        base64.b64decode(chart["data"]["image/png"]) == (tmp_path / "run/training_viz/training_latest.png").read_bytes()
    )
    # Both were there before and are the same outputs: that of the bar went through fewer steps.
    bars = [update["data"]["text/html"] for update in updates if "text/html" in update["data"]]
    steps = [int(re.search(r"Training: (\d+) of 40", text)[1]) for text in bars]
    assert steps == sorted(steps) and steps[0] < 40 and steps[-1] == 40
    assert len({update["transient"]["display_id"] for update in updates}) == 2
    said = "".join(output["text"] for output in trained if output["output_type"] == "stream")
    assert "Training:" not in said and "sample @ 20" in said and "done: 40 steps" in said
    (result,) = [output for output in trained if output["output_type"] == "execute_result"]
    assert result["data"]["text/plain"] == "0"

    (page,) = [output["data"]["text/html"] for output in shown]
    assert "tiny on" in page and ">40<" in page and "data:image/png;base64,iVBOR" in page


def test_a_run_without_steps_or_with_strange_names_shows_itself_too(tmp_path: Path):
    (tmp_path / "run.json").write_text(
        '{"run_id": "r", "corpus": {"name": "<script>", "mirror": "hub"}, "model": {"name": "tiny", "parameters": 5}, "tokenizer": "b"}'
    )
    page = Run(tmp_path)._repr_html_()
    assert "&lt;script&gt;" in page and "<script>" not in page and "No chart was drawn yet" in page
