"""What grows with a run, and what must not: charts, metrics, ledger, memory, long documents.

    python benchmarks/growth.py                  # minutes
    python benchmarks/growth.py --part memory    # 20,000 tiny steps: the longest part, only when asked for

Every part runs in a process of its own; the results are printed and kept as JSON under benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

ROWS = 1_000_000


def columns(rows: int) -> Any:
    """A ledger of `rows` steps as the views hold it."""
    import numpy as np

    from slimpajama_hf.record.columns import Columns

    draw = np.random.default_rng(0)
    steps = np.arange(rows)
    made = Columns()
    made.names["domain"] = [f"domain {number}" for number in range(7)]
    loss = 3 + 5 * np.exp(-steps / 20_000) + 0.4 * draw.standard_normal(rows)
    # What is measured at some steps only.
    seldom = {
        name: np.where(steps % every == 0, values, np.nan)
        for name, every, values in (
            ("grad_square", 500, 1 + 0 * loss), ("grad_agreement", 500, 0.1 + 0.02 * draw.standard_normal(rows)),
            ("loss_after", 100, loss - 0.05), ("next_loss", 100, loss),
        )
    }  # fmt: skip
    made._store = {name: np.zeros(rows, array.dtype) for name, array in made._store.items()} | {
        "step": steps, "loss": loss, "accuracy": np.clip(0.5 - loss / 20, 0, 1), "throughput": 3000 + 50 * loss,
        "learning_rate": np.minimum(1, (steps + 1) / 1000) * 1e-3, "grad_norm": np.exp(draw.standard_normal(rows)),
        "tokens": np.full(rows, 256), "text_bytes": np.full(rows, 1000), "code_bits": loss * 256 / 0.693,
        "domain": draw.integers(0, 7, rows).astype(np.int32), "samples": np.ones(rows, np.int32),
        "predicted": np.full(rows, 255), **seldom,
    }  # fmt: skip
    made._sha1, made._size = np.zeros((rows, 20), np.uint8), rows
    return made


def chart() -> dict[str, Any]:
    """Processor seconds of a chart of 1,000 and of 1,000,000 rows, the imports left out."""
    from slimpajama_hf.views import charts

    result: dict[str, Any] = {}
    caption = charts.Caption("growth", "synthetic rows", ROWS)
    for rows in (1000, ROWS):
        made, times = columns(rows), []
        for _ in range(4):
            with tempfile.TemporaryDirectory() as folder:
                start = time.process_time()
                charts.write(Path(folder), made, [], caption)
                times.append(time.process_time() - start)
        # The first one also loads fonts.
        result[f"cpu_seconds_at_{rows}"] = statistics.median(times[1:])
    return result


def metrics() -> dict[str, Any]:
    """`metrics_history.json` at 1,000,000 rows: seconds to write it, and per step at a write per 5 % of growth."""
    from slimpajama_hf.record.run_folder import RunFolder
    from slimpajama_hf.views import views

    made = columns(ROWS)
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder))
        run.viz.mkdir()
        start = time.process_time()
        views.write_metrics_history(run, made)
        seconds = time.process_time() - start
    return {"cpu_seconds": seconds, "ms_per_step": 1000 * seconds / (views.WRITTEN_AFTER_GROWTH * ROWS)}


def ledger_append() -> dict[str, Any]:
    """Microseconds to append a row at row 1,000 and at row 1,000,000."""
    from slimpajama_hf.record.ledger import Ledger, Row

    def row(step: int) -> Row:
        return Row(step, 5.1234, 0.25, 256, 1000, 3000.0, 1e-3, 1.5, "embedded", "a.jsonl.zst", step, "f" * 40,
                   "RedPajamaC4", 100, True, 1887.1, 0.08)  # fmt: skip

    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.jsonl"
        book = Ledger(path)
        for place in (1000, ROWS):
            if place == ROWS:
                book.close()
                line = path.read_bytes().splitlines(keepends=True)[-1]
                with open(path, "ab") as file:
                    for _ in range(100):
                        file.write(line * (ROWS // 100))
                book = Ledger(path, book.chain)
            else:
                for step in range(place):
                    book.append(row(step))
            times = []
            for step in range(place, place + 2000):
                start = time.perf_counter()
                book.append(row(step))
                times.append(time.perf_counter() - start)
            result[f"microseconds_at_{place}"] = 1e6 * statistics.median(times)
    return result


def lookback() -> dict[str, Any]:
    """Seconds to cut back, to verify and to report a run of 200,000 rows: 255 tokens each, its losses their means."""
    import numpy as np

    import run_clm_slimpajama
    from slimpajama_hf.lookback import checks
    from slimpajama_hf.record import run_folder
    from slimpajama_hf.record.ledger import Ledger, Row
    from slimpajama_hf.record.surprisals import Surprisals
    from slimpajama_hf.report import page

    rows, tokens = 200_000, 256
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as place:
        run = run_folder.RunFolder(Path(place) / "run")
        flags = ["--dataset", "embedded", "--model", "tiny", "--max_steps", "3", "--no-checkpoint"]
        run_clm_slimpajama.main([*flags, "--output_dir", str(run.path)])
        vocabulary = json.loads(run.record.read_text())["tokenizer_size"]
        run.ledger.unlink()
        run.surprisals.unlink()
        for name in run_folder.GROWING:
            (run.path / name).unlink(missing_ok=True)
        book, nats = Ledger(run.ledger), Surprisals(run.surprisals, 0)
        for step in range(rows):
            values = draw.exponential(3.0, tokens - 1).astype(np.float32)
            loss = float(values.mean(dtype=np.float64))
            bits = (loss * (tokens - 1) + np.log(vocabulary)) / np.log(2)
            nats.write(values)
            nats.advance(len(values))
            book.append(Row(step, loss, 0.25, tokens, 1000, 3000.0, 1e-3, 1.5, "embedded", f"{step // 5000}.jsonl.zst",
                            step % 5000, f"{step:040x}", "RedPajamaC4", 100, True, float(bits), 0.08))  # fmt: skip
        book.close()
        nats.close()
        shutil.rmtree(run.viz)
        found: dict[str, Any] = {"rows": rows, "ledger_mb": run.ledger.stat().st_size / 1e6}
        verified = None
        for name, act in {
            "verify": lambda: checks.verify(run.path),
            "cut_back": lambda: run_folder.cut_to(run, run, rows - 1000),
            "report": lambda: page.write(run.path),
        }.items():
            start = time.perf_counter(), time.process_time()
            outcome = act()
            found[f"{name}_seconds"] = time.perf_counter() - start[0]
            found[f"{name}_cpu_seconds"] = time.process_time() - start[1]
            verified = outcome if name == "verify" else verified
        assert verified is not None and verified.ok, verified.lines
    return found


def train(flags: list[str]) -> tuple[list[dict[str, Any]], list[int]]:
    """A training run of the tiny model: its ledger, and the resident bytes of its process at every 100th step."""
    import run_clm_slimpajama
    from slimpajama_hf.training import recorder

    resident: list[int] = []
    add = recorder.StepRecorder.add

    def watched(self: Any, step: Any, values: Any) -> None:
        add(self, step, values)
        if step.step % 100 == 0:
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)

    recorder.StepRecorder.add = watched  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        run_clm_slimpajama.main([*flags, "--model", "tiny", "--tokenizer", "builtin", "--output_dir", str(run)])
        rows = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    return rows, resident


def documents(size: int) -> dict[str, Any]:
    """Steps over documents of `size` bytes each: wall milliseconds a step, reading included."""
    draw = random.Random(0)
    words = ["".join(draw.choice("etaoinshrdlucm") for _ in range(draw.randint(2, 9))) for _ in range(5000)]
    steps = 120
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "documents.jsonl"
        with open(path, "w") as file:
            for _ in range(steps):
                # Other words in front, the rest repeated: making the text must not take longer than the benchmark.
                opening = " ".join(draw.choices(words, k=1000))
                file.write(json.dumps({"text": (opening * (size // len(opening) + 1))[:size]}) + "\n")
        start = time.perf_counter()
        rows, _ = train(
            ["--dataset", str(path), "--max_steps", str(steps), "--no-checkpoint", "--viz_interval", "1000000",
             "--display_samples", "1000000"]
        )  # fmt: skip
        seconds = time.perf_counter() - start
    spent = [row["tokens"] / row["throughput"] for row in rows[20:]]
    return {"ms_per_step": 1000 * statistics.fmean(spent), "seconds_of_all": seconds, "tokens": rows[-1]["tokens"]}


def memory() -> dict[str, Any]:
    """Resident megabytes of a run with everything on, after 1,000 steps and after 20,000."""
    _, resident = train(["--dataset", "embedded", "--epochs", "3", "--max_steps", "20001", "--save_steps", "5000"])
    return {"mb_after_1000": resident[10] / 1e6, "mb_after_20000": resident[200] / 1e6,
            "mb_every_1000": [round(value / 1e6, 1) for value in resident[::10]]}  # fmt: skip


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "chart": chart,
    "metrics": metrics,
    "ledger": ledger_append,
    "lookback": lookback,
    "documents of 4 KB": lambda: documents(4096),
    "documents of 10 MB": lambda: documents(10_000_000),
    "memory": memory,
}


def main() -> None:
    from benchmarks.steps import commit, machine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=list(PARTS), action="append", help="only this part; may be repeated")
    parser.add_argument("--row", choices=list(PARTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(PARTS[options.row]()))
        return
    found: dict[str, Any] = {}
    for part in options.part or [name for name in PARTS if name != "memory"]:
        done = subprocess.run(
            [sys.executable, __file__, "--row", part], capture_output=True, text=True, cwd=ROOT, check=False
        )
        if done.returncode:
            raise SystemExit(f"{part} failed:\n{done.stderr}")
        found[part] = json.loads(done.stdout.splitlines()[-1])
        print(f"{part}: {json.dumps(found[part])}")
    date = time.strftime("%Y-%m-%d")
    suffix = f"-{options.part[0]}" if options.part in (["memory"], ["lookback"]) else ""
    path = ROOT / "benchmarks" / "results" / f"growth{suffix}-{date}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        json.dumps({"date": date, "commit": commit(), "machine": machine(), "parts": found}, indent=1) + "\n"
    )
    print(f"kept in {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
