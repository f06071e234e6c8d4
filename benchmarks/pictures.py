"""The small pictures of README: python benchmarks/pictures.py [--only speed|resume] [--find-in RUN]

`speed.png` is drawn from the newest `steps-tiny-bfloat16-cpu-*.json` of benchmarks/results/. For `resume.png` two runs
are trained, one of them killed three times. `find.svg` is what `inspect --find` prints of a run.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from slimpajama_hf import palette  # noqa: E402

DOCS = ROOT / "docs"
STEPS, KILLS = 300, (70, 150, 240)
SHOWN_ROWS = ("floor", "bare loop", "stock Trainer", "stock Trainer, plain callbacks", "ours, everything on")


def _axes(width: float, height: float, rows: int = 1, ratios: tuple[int, ...] = (1,)) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"font.size": 11, "axes.edgecolor": palette.GRID, "text.color": palette.INK})
    figure, axes = pyplot.subplots(
        rows, 1, figsize=(width, height), sharex=True, layout="constrained", gridspec_kw={"height_ratios": ratios}
    )
    figure.set_facecolor(palette.PAPER)
    for each in [axes] if rows == 1 else axes:
        each.set_facecolor(palette.PAPER)
        each.tick_params(colors=palette.MUTED, length=0)
        for side in ("top", "right", "left"):
            each.spines[side].set_visible(False)
    return figure, axes


def speed() -> None:
    """Milliseconds a step of each row, the median of its rounds."""
    path = max((ROOT / "benchmarks/results").glob("steps-tiny-bfloat16-cpu-*.json"), key=_made)
    found = json.loads(path.read_text())
    medians = {
        name: statistics.median(each["ms_per_step"] for each in found["rows"][name])
        for name in SHOWN_ROWS
        if name in found["rows"]
    }
    figure, axes = _axes(7, 2.6)
    names = list(reversed(medians))
    colours = [palette.ACCENT if name.startswith("ours") else palette.POINT for name in names]
    axes.barh(names, [medians[name] for name in names], color=colours, height=0.62)
    for place, name in enumerate(names):
        axes.text(medians[name] + 0.8, place, f"{medians[name]:.1f} ms", va="center", color=palette.INK)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.set_xlim(0, 1.18 * max(medians.values()))
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_color(palette.INK)
        label.set_fontweight("bold" if name.startswith("ours") else "normal")
    title = f"one step of the 5M model, 256 tokens, bfloat16, 2 cores ({found['machine']['processor']})"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=palette.MUTED)
    figure.savefig(DOCS / "speed.png", dpi=160)


def _made(path: Path) -> tuple[str, float]:
    found = json.loads(path.read_text())
    # Of one day, the one that has all rows.
    return found["date"], sum(name in found["rows"] for name in SHOWN_ROWS)


def flags(run: Path) -> list[str]:
    script, config = str(ROOT / "run_clm_slimpajama.py"), str(ROOT / "configs/laptop.yaml")
    return [sys.executable, script, "--config", config, "--max_steps", str(STEPS), "--save_steps", "25",
            "--warmup_steps", "60", "--output_dir", str(run), "--viz_interval", "1000000", "--display_samples",
            "1000000", "--resume_from_checkpoint", "true"]  # fmt: skip


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "ledger.jsonl").read_text().splitlines()]


def train(place: Path) -> tuple[Path, Path]:
    """(a run that was never stopped, one that was killed at each of `KILLS`)."""
    unbroken, killed = place / "unbroken", place / "killed"
    subprocess.run(flags(unbroken), check=True, capture_output=True)
    ledger = killed / "ledger.jsonl"
    for step in KILLS:
        process = subprocess.Popen(flags(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (ledger.is_file() and ledger.read_bytes().count(b"\n") >= step):
            if process.poll() is not None:
                raise SystemExit(f"the run ended before step {step}")
            time.sleep(0.01)
        process.kill()
        process.wait()
    subprocess.run(flags(killed), check=True, capture_output=True)
    return unbroken, killed


def resume(unbroken: Path, killed: Path) -> None:
    """Losses of both runs, and their difference."""
    left, right = losses(unbroken), losses(killed)
    differences = [a - b for a, b in zip(left, right, strict=True)]
    figure, (above, below) = _axes(7, 3.6, 2, (4, 1))
    above.plot(left, ".", color=palette.POINT, markersize=4, label="never stopped")
    above.plot(right, "-", color=palette.ACCENT, linewidth=0.8, label="killed three times")
    for step in KILLS:
        above.axvline(step, color=palette.ALARM, linewidth=1)
        above.text(step + 4, max(left), "kill -9", color=palette.ALARM, va="top", fontsize=9)
    above.set_ylabel("loss of each step, nats", color=palette.MUTED, fontsize=9)
    above.legend(frameon=False, fontsize=9, loc="lower left")
    below.plot(differences, "-", color=palette.INK, linewidth=1)
    below.set_ylabel("difference", color=palette.MUTED, fontsize=9)
    below.set_xlabel("step", color=palette.MUTED, fontsize=9)
    most = max(map(abs, differences))
    below.text(len(left) - 1, 0, f"largest: {most:g}", ha="right", va="bottom", fontsize=9, color=palette.INK)
    below.set_ylim(-1, 1)
    figure.savefig(DOCS / "resume.png", dpi=160)


def find(run: Path, text: str = "Return the number of") -> None:
    """What `inspect --find` prints, as a picture of a terminal."""
    from rich.console import Console
    from rich.text import Text

    words = ["python", "-m", "slimpajama_hf", "inspect", "runs/mine", "--find", f'"{text}"']
    command = [sys.executable, "-m", "slimpajama_hf", "inspect", str(run), "--find", text]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(Text(f"$ {' '.join(words)}", style="bold"))
    shown = done.stdout.replace(str(run), "runs/mine").splitlines()
    console.print(Text("\n".join(shown[:14])))
    svg = console.export_svg(title="inspect --find")
    # A picture that asks nobody for a font.
    (DOCS / "find.svg").write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.S))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["speed", "resume"])
    parser.add_argument("--find-in", type=Path, metavar="RUN", help="draw find.svg alone, of this run")
    options = parser.parse_args()
    if options.find_in is not None:
        find(options.find_in)
        return
    if options.only != "resume":
        speed()
    if options.only != "speed":
        with tempfile.TemporaryDirectory() as place:
            resume(*train(Path(place)))


if __name__ == "__main__":
    main()
