"""The report, looked at in a real browser: what it shows is what the run's files say, and it asks for nothing."""

from __future__ import annotations

import hashlib
import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slimpajama_hf import report
from slimpajama_hf.errors import UserError
from slimpajama_hf.record import surprisals
from slimpajama_hf.record.columns import Reader
from slimpajama_hf.record.run_folder import RunFolder
from slimpajama_hf.report import content, packing
from tests.conftest import ROOT, environment, run_command
from tests.report import browser
from tests.report.browser import Browser

needs_browser = pytest.mark.skipif(browser.PROGRAM is None, reason=browser.NONE_HERE)

HOSTILE = [
    "</script><script>window.hacked = 1</script>", "<img src=x onerror='window.hacked = 1'>", "]]>--><!--", "${window.hacked=1}",
    "שלום עולם", "👩‍👩‍👧", "\u202egnp.exe", "zero\u200bwidth", "\x00\x07", "&lt;b&gt;", "a\n\tb", "\u2028", "{{data}}",
]  # fmt: skip


def make_run(folder: Path, steps: int, *, passports: int = 20, bare: bool = False) -> Path:
    """A run folder as training leaves one, with hostile texts; `bare`: the ledger of an older version alone."""
    folder.mkdir(parents=True)
    draw, normal = random.Random(1), np.random.default_rng(1)
    domains = ["RedPajamaC4", "RedPajamaGithub", "<b>mine</b>"]
    rows, nats = [], []
    for step in range(steps):
        tokens = draw.choice([2, 17, 64, 256])
        values = normal.gamma(1.2, (3 + 5 * math.exp(-step / 50)) / 1.2, tokens - 1).astype(np.float32)
        nats.append(values)
        loss = float(str(np.float32(values.mean()))) if step != 33 else None
        row = {
            "step": step, "loss": loss, "accuracy": draw.randint(0, tokens - 1) / (tokens - 1), "tokens": tokens,
            "text_bytes": 4 * tokens, "throughput": 1000.5, "learning_rate": 1e-3 * min(1, (step + 1) / 10),
            "grad_norm": 1.5 + step / steps, "mirror": "local", "shard": "<i>shard</i>.jsonl", "row": 3 * step,
            "text_sha1": hashlib.sha1(str(step).encode()).hexdigest(), "domain": domains[step % 3], "tokens_cut": step % 5,
            "tokens_cut_exact": step % 2 == 0, "code_bits": (loss or 0) * (tokens - 1) / math.log(2) + 12, "step_seconds": 0.05,
            "chain": "0" * 32,
        }  # fmt: skip
        if not bare:
            row |= {"update_skipped": "not finite" if step == 33 else "", "spike": 6.25 if step == 40 else None, "part": 0,
                    "skipped": {"empty": 2} if step == 7 else {}, "gaps": [], "documents": []}  # fmt: skip
            row |= {"loss_after": loss and loss - 0.15, "next_loss": 5.0}
            if step % 10 == 9:
                # Of the first block's attention signal stands out, of its MLP nothing does.
                sign = 1 if step % 20 == 9 else -1
                row["grad_layers"] = {"wte": [0.5, 0.02 + 0.001 * sign], "h.0.attn": [0.2, 0.02], "h.0.mlp": [0.1, 0.01 * sign]}  # fmt: skip
        rows.append(json.dumps(row, separators=(",", ":")))
    (folder / "ledger.jsonl").write_text("".join(line + "\n" for line in rows))
    if bare:
        return folder
    side = surprisals.Surprisals(folder / surprisals.FILE_NAME)
    for values in nats:
        side.write(values)
        side.advance(len(values))
    side.close()
    lines = []
    for step in np.linspace(0, steps - 1, passports).astype(int).tolist():
        size = len(nats[step]) + 1
        pieces = (HOSTILE * 20)[:size]
        ids = [HOSTILE.index(piece) for piece in pieces]
        before = [round(float(value), 5) for value in nats[step]]
        top = [[i, 40, 41, 42, 43] for i in ids[1:]]
        lines.append({"step": step, "input_ids": ids, "pieces": pieces, "before": before, "after": [round(0.9 * v, 5) for v in before],
                      "top_ids": top, "top_probs": [[0.5, 0.2, 0.1, 0.05, 0.01]] * (size - 1),
                      "guesses": {str(i): f"<u>{i}" for i in {t for row in top for t in row}}})  # fmt: skip
    lines.append({"step": 12, "input_ids": [0], "pieces": []})  # no passport
    _write_lines(folder / "passports.jsonl", lines)
    _write_lines(folder / "samples.jsonl", [
        {"step": step, "input": HOSTILE[0], "output": HOSTILE[1], "accuracy": 0.5, "domain": domains[0], "continuation": "true <b>text</b>"}
        for step in range(0, steps, 10)])  # fmt: skip
    _write_lines(folder / "prompts.jsonl", [
        {"step": step, "texts": [{"prompt": "<p>", "output": f" one two {step}"}]} for step in (0, 10, 30)])  # fmt: skip
    home = Path.home()
    record = {"run_id": "r", "max_steps": 2 * steps, "command": ["run", f"{home}/data"], "tokenizer": "builtin",
              "model": {"name": "tiny", "parameters": 5, "vocab_size": 4096, "sample_mode": "truncate", "max_seq_length": 256, "precision": "float32"},
              "corpus": {"name": "<script>", "mirror": "local"}, "sessions": [{"step": 0}, {"step": 50}]}  # fmt: skip
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "run_config.yaml").write_text(f'# The\ndataset: "{home}/data"\n# seed: 1\n')
    for step in (25, 50):
        (folder / f"checkpoint-{step}").mkdir()
    return folder


def _write_lines(path: Path, lines: list[Any]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("runs") / "run", 120)
    report.write(folder)
    return folder


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def shown(run: Path, tab: Browser) -> Browser:
    """The report of the run, open, at its first view."""
    tab.errors.clear()
    tab.requests.clear()
    tab.size(1280, 900)
    tab.call("Page.navigate", url="about:blank")
    tab.open((run / "report.html").as_uri())
    return tab


def go(tab: Browser, step: int) -> None:
    tab.value(
        f"(() => {{ const s = document.querySelector('#slider'); s.value = {step}; s.dispatchEvent(new Event('input')); }})()"
    )
    tab.frame()


@needs_browser
def test_it_opens_from_disk_without_an_error_or_a_request(run, shown):
    address = (run / "report.html").as_uri()
    assert shown.errors == []
    assert [url for url in shown.requests if not url.startswith(("data:", "about:"))] == [address]
    assert shown.value("document.querySelectorAll('.chart').length") >= 8
    assert "connect-src 'none'" in (run / "report.html").read_text()


@needs_browser
def test_the_slider_moves_every_panel_and_shows_the_numbers_of_the_ledger(run, shown):
    rows = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    for step in (0, 40, 119, 33):
        go(shown, step)
        row = rows[step]
        assert shown.text("#step-title") == str(step)
        assert shown.text("#passport-loss") == (f"{row['loss']:.4f}" if row["loss"] is not None else "–")
        assert shown.text("#passport-accuracy") == f"{100 * row['accuracy']:.1f} %"
        assert shown.text("#passport-row") == str(row["row"])
        assert shown.text("#passport-tokens") == str(row["tokens"])
        assert shown.text("#passport-sha1") == row["text_sha1"]
        assert shown.text("#passport-shard") == "<i>shard</i>.jsonl"
        if row["loss"] is not None:
            assert f"step {step}: {row['loss']:.4f}" in shown.text("#chart-loss .readout")
    assert "The update was skipped (not finite)" in shown.text("#passport")
    go(shown, 40)
    assert "Loss spike: 6." in shown.text("#passport")
    go(shown, 7)
    assert "2 empty" in shown.text("#passport")
    go(shown, 50)
    assert "checkpoint-50" in shown.text("#passport") and "resumed here" in shown.text("#passport")
    go(shown, 29)
    assert "as of step 10; what differs from step 0" in shown.text("#writing-note")
    assert shown.text("#prompts mark").strip() == "10"
    assert shown.errors == []


@needs_browser
def test_what_a_document_holds_is_shown_and_never_run(run, shown):
    found = [json.loads(line) for line in (run / "passports.jsonl").read_text().splitlines()]
    passport = max(found, key=lambda passport: len(passport["pieces"]))
    go(shown, passport["step"])
    text = shown.text(".document")
    assert HOSTILE[0] in text and HOSTILE[1] in text and "שלום" in text and "👩‍👩‍👧" in text
    assert "⟨U+202E⟩gnp.exe" in text and "⟨U+200B⟩" in text and "⟨U+0000⟩" in text
    assert shown.value("window.hacked === undefined")
    assert shown.value("document.querySelectorAll('#reading img, #reading script, main img, main u').length") == 0
    assert HOSTILE[0] not in (run / "report.html").read_text()
    assert shown.errors == []


@needs_browser
def test_tokens_say_their_surprisal_and_the_five_guesses(run, shown):
    passport = json.loads((run / "passports.jsonl").read_text().splitlines()[0])
    go(shown, 0)
    box = shown.box('.document [data-token="1"]')
    shown.mouse("mouseMoved", box["x"] + 2, box["y"] + box["height"] / 2)
    shown.frame()
    said = shown.text("#popover")
    assert not shown.value("document.querySelector('#popover').hidden")
    value = passport["before"][0]
    assert f"{value:.4f} nats" in said
    assert shown.value("document.querySelectorAll('#popover tr').length") == 5 and "50 %" in said
    assert "less surprising" in shown.text("#taught")
    shown.value("document.querySelector('[data-mode=taught]').click()")
    shown.frame()
    assert shown.value("document.querySelector('[data-mode=taught]').getAttribute('aria-pressed')") == "true"
    go(shown, 1)
    assert "is not in this page" in shown.text("#reading") and "inspect" in shown.text("#reading")


@needs_browser
def test_layers_stand_with_their_noise_scale_or_say_that_there_is_none(run, shown):
    names = shown.value("[...document.querySelectorAll('#layers .layer-name')].map(node => node.textContent)")
    assert names == ["tokens, head", "block 0"]
    said = shown.value("[...document.querySelectorAll('#layers .lane')].map(node => node.title)")
    assert said[0].startswith("wte: 24 (") and said[0].endswith("62.5 % of the gradient's square")
    assert said[1].startswith("h.0.attn: 9.0 (9.0 to 9.0)") and said[2].startswith("h.0.mlp: nothing stands out; above")
    assert "nothing stands out of the noise here" in shown.text("#layers")
    assert "latest 12 measurements of 12" in shown.text("#layers")


@needs_browser
def test_what_documents_teach_stands_by_domain_with_its_errors(run, shown):
    rows = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    table = shown.value(
        "[...document.querySelectorAll('#teaching tbody tr')].map(row => [...row.cells].map(cell => cell.textContent))"
    )
    assert [row[0] for row in table] == ["all", "<b>mine</b>", "C4", "GitHub"]
    # Steps from the end of warm-up on, without the one whose loss was no number.
    assert [row[1] for row in table] == ["110", "37", "36", "37"] and table[0][2] == "150.0 ± 0.0"
    # Domains take turns: no document is followed by one of its own.
    assert {row[3] for row in table} == {"–"}
    falls = [5.0 - row["loss"] for row in rows[10:] if row["loss"] is not None]
    mean, error = np.mean(falls), np.std(falls, ddof=1) / len(falls) ** 0.5
    number, of_error = table[0][4].replace(",", "").replace("−", "-").split(" ± ")
    assert float(number) == pytest.approx(1000 * mean, abs=0.06)
    assert float(of_error) == pytest.approx(1000 * error, abs=0.06)
    assert "where it has the same domain: measured too few times to say" in shown.text("#teaching")


@needs_browser
def test_what_was_not_measured_is_not_shown(tab, tmp_path):
    tab.errors.clear()
    tab.call("Page.navigate", url="about:blank")
    tab.open(report.write(make_run(tmp_path / "run", 60, bare=True)).as_uri())
    assert "Not measured yet" in tab.text("#layers") and "Not measured yet" in tab.text("#teaching")
    assert tab.errors == []


@needs_browser
def test_a_number_that_was_added_to_a_step_has_a_panel_and_a_line(tab, tmp_path):
    folder = make_run(tmp_path / "run", 60)
    path = folder / "ledger.jsonl"
    rows = [json.loads(line) | {"weight_norm": 2.0 + step / 100} for step, line in enumerate(path.open())]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = json.loads((folder / "run.json").read_text()) | {"numbers": {"weight_norm": "L2 norm of all weights"}}
    (folder / "run.json").write_text(json.dumps(record))
    tab.errors.clear()
    tab.call("Page.navigate", url="about:blank")
    tab.open(report.write(folder).as_uri() + "#step=7")
    head = tab.text("#chart-added-weight_norm .chart-head")
    assert "Weight norm" in head and "L2 norm of all weights" in head and "2.07" in head
    assert "weight norm" in tab.text("#passport") and "2.0700" in tab.text("#passport")
    assert tab.errors == []


@needs_browser
def test_charts_zoom_by_drag_and_wheel_and_choose_the_step(shown):
    box = shown.box("#chart-loss .plot")
    middle = box["y"] + box["height"] / 2
    shown.click(box["x"] + 46 + 0.5 * (box["width"] - 52), box["y"] + box["height"] - 24)
    assert abs(int(shown.text("#step-title")) - 59) <= 2
    assert shown.value("document.querySelector('#unzoom').disabled")
    shown.drag(box["x"] + 100, middle, box["x"] + 500, middle)
    assert not shown.value("document.querySelector('#unzoom').disabled")
    shown.value("document.querySelector('#unzoom').click()")
    shown.frame()
    assert shown.value("document.querySelector('#unzoom').disabled")
    shown.mouse("mouseWheel", box["x"] + 300, middle, deltaX=0, deltaY=-100, modifiers=2)
    shown.frame()
    assert not shown.value("document.querySelector('#unzoom').disabled")
    assert shown.errors == []


@needs_browser
def test_fingers_choose_the_step_and_zoom(shown):
    shown.size(390, 844, touch=True)
    shown.frame()
    go(shown, 5)
    box = shown.box("#chart-loss .plot")
    middle = box["y"] + box["height"] / 2

    def touch(kind: str, *places: float) -> None:
        points = [{"x": box["x"] + place, "y": middle, "id": number} for number, place in enumerate(places)]
        shown.call("Input.dispatchTouchEvent", type=kind, touchPoints=points)

    touch("touchStart", 46 + 0.5 * (box["width"] - 55))
    touch("touchEnd")
    shown.frame()
    assert abs(int(shown.text("#step-title")) - 59) <= 5
    assert shown.value("document.querySelector('#unzoom').disabled")
    touch("touchStart", 150, 200)
    for by in (10, 30, 50):
        touch("touchMove", 150 - by, 200 + by)
    touch("touchEnd")
    shown.frame()
    assert not shown.value("document.querySelector('#unzoom').disabled")
    assert shown.errors == []


@needs_browser
def test_the_mouse_over_one_chart_is_shown_in_all(shown):
    go(shown, 5)
    box = shown.box("#chart-loss .plot")
    shown.mouse("mouseMoved", box["x"] + 46 + 0.75 * (box["width"] - 55), box["y"] + box["height"] - 26)
    shown.frame()
    step = int(shown.text("#chart-loss .readout").split()[1].rstrip(":"))
    assert abs(step - 89) <= 2 and shown.text("#step-title") == "5"
    assert shown.text("#chart-gradient .readout").startswith(f"{1.5 + step / 120:.3f}")
    lines = "[...document.querySelectorAll('.chart:not([hidden]) .u-cursor-x')].filter(line => !line.matches('.u-off')).length"
    assert shown.value(lines) == shown.value(
        "document.querySelectorAll('.chart:not([hidden]) .plot:not(.still)').length"
    )


@needs_browser
def test_the_step_axis_is_linear_or_logarithmic(shown):
    def place() -> float:
        """Of the slider's line in the loss chart, as a part of its width."""
        box, line = shown.box("#chart-loss .u-over"), shown.box("#chart-loss .here")
        return (line["x"] + line["width"] / 2 - box["x"]) / box["width"]

    go(shown, 59)
    assert place() == pytest.approx(59 / 119, abs=0.01)
    shown.value("document.querySelector('[data-value=log]').click()")
    shown.frame()
    assert place() == pytest.approx(math.asinh(59) / math.asinh(119), abs=0.01)
    shown.value("document.querySelector('[data-value=linear]').click()")
    shown.frame()
    assert place() == pytest.approx(59 / 119, abs=0.01)
    assert shown.errors == []


@needs_browser
def test_domains_are_switched_and_keys_step(shown):
    go(shown, 10)
    before = shown.value("document.querySelector('#chart-loss canvas').toDataURL()")
    shown.value("document.querySelector('.chip').click()")
    shown.frame()
    assert shown.value("document.querySelector('.chip').getAttribute('aria-pressed')") == "false"
    assert shown.value("document.querySelector('#chart-loss canvas').toDataURL()") != before
    shown.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight")
    shown.frame()
    assert shown.text("#step-title") == "11"
    assert shown.value("location.hash") == "#step=11"


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (820, False), (1280, True)])
def test_it_fits_every_width_in_both_themes(shown, width, dark):
    shown.size(width, 844, touch=width < 500)
    shown.scheme("dark" if dark else "light")
    shown.frame()
    assert shown.value("document.documentElement.scrollWidth") <= width
    paper = shown.value("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(21, 24, 28)") == dark
    shown.scheme("light")
    assert shown.errors == []


@needs_browser
def test_a_hundred_thousand_steps_stay_small_and_quick(tab, tmp_path):
    run = make_run(tmp_path / "run", 1000, passports=250)
    lines = (run / "ledger.jsonl").read_text().splitlines()
    with open(run / "ledger.jsonl", "w") as file:
        for step in range(100_000):
            line = lines[step % 1000]
            digest = hashlib.sha1(str(step).encode()).hexdigest()
            line = line.replace(f'"step":{step % 1000},', f'"step":{step},', 1)
            at = line.index('"text_sha1":"') + 13
            file.write(line[:at] + digest + line[at + 40 :] + "\n")
    text = "The river and the city of the old world, "
    _write_lines(run / "samples.jsonl", [
        {"step": step, "input": f"{step} {text}", "output": text * 3, "accuracy": 0.2, "domain": "d", "continuation": text * 3}
        for step in range(0, 100_000, 5)])  # fmt: skip
    begun = time.monotonic()
    path = report.write(run)
    assert time.monotonic() - begun < 20, "5 s on a machine of its own"
    assert path.stat().st_size < 5_000_000
    tab.call("Page.navigate", url="about:blank")
    tab.open(path.as_uri())
    tab.until("performance.getEntriesByName('first-contentful-paint').length")  # told some time after the paint
    assert tab.value("performance.getEntriesByName('first-contentful-paint')[0].startTime") < 1000
    go(tab, 99_999)
    assert tab.text("#step-title") == "99,999"
    # The last sample that was stored is among those in the page.
    assert "99995 The river" in tab.text("#sample")


@pytest.mark.parametrize("what", ["bare", "torn", "empty", "broken files", "no side file"])
def test_old_torn_and_young_runs_give_a_report_that_says_so(tmp_path, what):
    run = make_run(tmp_path / "run", 60, bare=what == "bare")
    if what == "torn":
        with open(run / "ledger.jsonl", "a") as file:
            file.write('{"step": 60, "lo')
    elif what == "empty":
        (run / "ledger.jsonl").write_text("")
    elif what == "broken files":
        for name in ("passports.jsonl", "samples.jsonl", "prompts.jsonl", "run.json"):
            (run / name).write_bytes(b'\xff{"step": 0, "input_ids": [1,2], "pieces"\nnull\n[]\n{}\n')
        (run / "surprisals.f32").write_bytes(b"\x01")
    elif what == "no side file":
        (run / "surprisals.f32").unlink()
    path = report.write(run)
    assert path.stat().st_size > 50_000
    meta, arrays = content.gather(RunFolder(run), Reader(run / "ledger.jsonl"))
    assert meta["steps"] == len(arrays["loss"]) == (0 if what == "empty" else 60)
    json.dumps(meta, allow_nan=False)
    if what in ("bare", "broken files", "no side file"):
        assert any("surprisals" in note for note in meta["notes"])


@needs_browser
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_the_youngest_runs_open(tab, tmp_path, steps):
    run = make_run(tmp_path / "run", steps, bare=True)
    tab.errors.clear()
    tab.call("Page.navigate", url="about:blank")
    tab.open(report.write(run).as_uri())
    assert tab.errors == []


def test_no_run_is_an_error_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no run in it"):
        report.write(tmp_path)
    done = run_command("report", str(tmp_path))
    assert done.returncode == 1 and "Traceback" not in done.stderr


def test_the_home_folder_is_not_told(run):
    meta, _ = content.gather(RunFolder(run), Reader(run / "ledger.jsonl"))
    assert ["dataset", '"~/data"'] in meta["config"]
    assert str(Path.home()) not in json.dumps([meta["config"], meta["about"], meta["shards"]])


def test_surprisals_are_the_side_files_to_a_ten_thousandth(run):
    _, arrays = content.gather(RunFolder(run), Reader(run / "ledger.jsonl"))
    first = json.loads((run / "passports.jsonl").read_text().splitlines()[0])
    size = len(first["before"])
    assert np.allclose(arrays["before"][:size] / 10000, first["before"], rtol=0, atol=1e-4)
    side = surprisals.read(run / surprisals.FILE_NAME, 0, size)
    assert np.allclose(arrays["before"][:size] / 10000, side, rtol=0, atol=1e-4)


def test_packing_refuses_what_the_page_cannot_read():
    with pytest.raises(ValueError, match="float64"):
        packing.pack({}, {"loss": np.zeros(3)})
    assert packing.pack({"a": 1}, {"x": np.arange(5, dtype=np.uint32)}) == packing.pack(
        {"a": 1}, {"x": np.arange(5, dtype=np.uint32)}
    )


def test_a_growing_ledger_is_read_on_and_one_cut_back_anew(tmp_path):
    run = make_run(tmp_path / "run", 50)
    path = run / "ledger.jsonl"
    whole = path.read_bytes()
    half = whole[: len(whole) // 2]
    path.write_bytes(half)
    reader = Reader(path)
    assert len(reader.update()) == half.count(b"\n")
    path.write_bytes(whole)
    rows = reader.update()
    assert len(rows) == 50 and rows.seldom["spike"] == {40: 6.25}
    assert rows.seldom["update_skipped"] == {33: "not finite"}
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:10]))
    assert len(reader.update()) == 10 and not reader.update().seldom["spike"]


def test_it_needs_no_torch():
    code = "import slimpajama_hf.report, slimpajama_hf.report.watch, sys; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT).returncode == 0
