"""The pictures of README and docs: benchmarks/pictures.py [--only NAME] [--find-in RUN] [--report-of RUN]

`speed.png` is drawn from the newest `steps-tiny-bfloat16-cpu-*.json` of benchmarks/results/, `batch-one.png` from the
held-out losses of `learning.py` and `comparison.py` there. For `resume.png` two runs
are trained, one of them killed three times. `find.svg` is what `inspect --find` prints of a run. `--report-of` takes
the chart, the animation and the report of a run; those of docs/ are of `--config configs/laptop.yaml --max_steps 6000`.
It needs chromium and pdftoppm (Debian: chromium, poppler-utils).
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import re
import shutil
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


def _axes(
    width: float, height: float, rows: int = 1, ratios: tuple[int, ...] = (1,), columns: int = 1
) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"font.size": 11, "axes.edgecolor": palette.GRID, "text.color": palette.INK})
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(width, height), sharex="col", layout="constrained",
        gridspec_kw={"height_ratios": ratios},
    )  # fmt: skip
    figure.set_facecolor(palette.PAPER)
    for each in [axes] if rows == columns == 1 else axes:
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


def batch_one() -> None:
    """Held-out loss by the rate of AdamW, next to ours, after 2,500 documents and after 10,000."""
    rows, theirs = (
        _lines(ROOT / f"benchmarks/results/{each}/a-redpajama-sample.jsonl") for each in ("learning", "comparison")
    )
    figure, axes = _axes(9, 3.6, columns=2)
    for place, steps in zip(axes, (2_500, 10_000), strict=True):
        of_steps = [row for row in rows if row["steps"] == steps]
        for words, weights, colour in (
            ("last weights", "last", palette.POINT),
            ("averaged", "average 0.06", palette.MUTED),
        ):
            found = sorted(
                (
                    1e-3 if row["arm"] == "plain" else float(row["arm"].rpartition(" ")[2]),
                    row["scores"][weights]["report"]["loss"],
                )
                for row in of_steps
                if row["arm"].startswith("plain") and weights in row["scores"]
            )
            place.plot(*zip(*found, strict=True), "o-", color=colour, label=f"AdamW, a constant rate, {words}")
        cosine = sorted(
            (float(row["arm"].split(", ")[1]), row["marks"][-1]["scores"]["last"]["report"]["loss"])
            for row in theirs
            if "cosine" in row["arm"] and row["documents"] == steps
        )
        if cosine:
            place.plot(*zip(*cosine, strict=True), "s--", color=palette.INK, label="AdamW, half-life 1M tokens, cosine")
        for words, weights, style in (("last weights", "last", ":"), ("averaged", "average 0.06", "-")):
            ours = [row["scores"][weights]["report"]["loss"] for row in of_steps if row["arm"] == "default"]
            place.axhline(statistics.mean(ours), color=palette.ACCENT, linestyle=style, label=f"ours, {words}")
        place.set_xscale("log")
        place.set_xticks([1e-4, 3e-4, 1e-3, 3e-3], ["1e-4", "3e-4", "1e-3", "3e-3"])
        place.minorticks_off()
        place.set_xlim(4e-5, 4e-3)
        place.set_title(f"{steps:,} documents", loc="left", fontsize=11, color=palette.INK)
        place.set_xlabel("learning rate of AdamW", color=palette.MUTED)
    axes[0].set_ylabel("held-out loss, nats per token", color=palette.MUTED)
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(DOCS / "batch-one.png", dpi=160)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


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


def report_of(run: Path, pages: int = 3) -> None:
    """The last chart, the animation, parts of the report, and its first printed pages."""
    from tests.report.browser import Browser

    with tempfile.TemporaryDirectory() as place:
        # The report names the folder that it was made in.
        shown = Path(place) / "runs" / "embedded-tiny"
        shutil.copytree(run, shown)
        words = [sys.executable, "-m", "slimpajama_hf", "report", "runs/embedded-tiny"]
        for more in ([], ["--animate"]):
            subprocess.run([*words, *more], check=True, cwd=place, env=os.environ | {"PYTHONPATH": str(ROOT)})
        shutil.copy(shown / "training.gif", DOCS / "training.gif")
        shutil.copy(shown / "training_viz" / "training_latest.png", DOCS / "training.png")
        with Browser(Path(place) / "profile", width=1265, height=1717) as browser:
            browser.open((shown / "report.html").as_uri())
            browser.frame()
            sections = [("curves", "#curves"), ("step", "#one-step"), ("learning", "#learning")]
            for name, selector in sections:
                box = browser.value(f"document.querySelector({selector!r}).getBoundingClientRect().toJSON()")
                # The curves with what stands above them; a section begins with a rule and white, which are left out.
                top = 0 if name == "curves" else box["top"] + 30
                size = {"x": 0, "y": top, "width": 1265, "height": box["bottom"] - top, "scale": 1}
                made = browser.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=size)
                (DOCS / f"report-{name}.png").write_bytes(base64.b64decode(made["data"]))
            printed = Path(place) / "report.pdf"
            made = browser.call("Page.printToPDF", printBackground=True, paperWidth=8.27, paperHeight=11.69)
            printed.write_bytes(base64.b64decode(made["data"]))
        words = ["pdftoppm", "-png", "-r", "90", "-l", str(pages), str(printed), str(Path(place) / "page")]
        subprocess.run(words, check=True)
        for name, _ in sections:
            smaller(DOCS / f"report-{name}.png")
        side_by_side(sorted(Path(place).glob("page-*.png")), DOCS / "report-print.png")


def side_by_side(pages: list[Path], path: Path, gap: int = 22) -> None:
    """Pages in a row on grey."""
    from PIL import Image

    images = [Image.open(page).convert("RGB") for page in pages]
    width = sum(image.width + gap for image in images) + gap
    canvas = Image.new("RGB", (width, images[0].height + 2 * gap), "#d9d9d2")
    left = gap
    for image in images:
        canvas.paste(image, (left, gap))
        left += image.width + gap
    canvas.save(path)
    smaller(path)


def smaller(path: Path) -> None:
    """The same picture in 256 colours, as a file of a third of the size."""
    from PIL import Image

    Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["speed", "batch-one", "resume"])
    parser.add_argument("--find-in", type=Path, metavar="RUN", help="draw find.svg alone, of this run")
    parser.add_argument("--report-of", type=Path, metavar="RUN", help="take the pictures of its chart and report alone")
    options = parser.parse_args()
    if options.report_of is not None:
        report_of(options.report_of)
        return
    if options.find_in is not None:
        find(options.find_in)
        return
    if options.only in (None, "speed"):
        speed()
    if options.only in (None, "batch-one"):
        batch_one()
    if options.only in (None, "resume"):
        with tempfile.TemporaryDirectory() as place:
            resume(*train(Path(place)))


if __name__ == "__main__":
    main()
