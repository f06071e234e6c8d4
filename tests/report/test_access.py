"""The report for everybody: on paper, for weak eyes, for readers of screens; and what it says first."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from slimpajama_hf import report
from slimpajama_hf.record import teaching
from slimpajama_hf.record.columns import Reader, read_columns
from slimpajama_hf.record.run_folder import RunFolder
from slimpajama_hf.report import content, documents
from tests.report import axe
from tests.report.browser import Browser
from tests.report.test_report import _write_lines, go, make_run, needs_browser

PAPER = (8.27, 11.69)  # inches: A4

#: Of every text that is seen: its colour against the first opaque background behind it. [contrast, colour, ...] below 4.5.
PALE_TEXTS = """(() => {
  const channels = (colour) => { const [r, g, b, a = 1] = colour.match(/[\\d.]+/g).map(Number), all = colour.startsWith("color(srgb") ? 255 : 1; return [all * r, all * g, all * b, a]; };
  const luminance = ([r, g, b]) => [r, g, b].map((v) => v / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, k) => sum + c * [0.2126, 0.7152, 0.0722][k], 0);
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, at = node.parentElement;
    if (!node.textContent.trim() || !at.checkVisibility() || at.closest("script, noscript, button:disabled, .unseen, option")) continue;
    let faded = false;
    const style = getComputedStyle(at);
    let paper = null;
    for (let up = at; up; up = up.parentElement) {
      if (getComputedStyle(up).opacity !== "1") faded = true;
      const behind = channels(getComputedStyle(up).backgroundColor);
      if (paper === null && behind[3] > 0.9) paper = behind;
    }
    const [low, high] = [luminance(channels(style.color)), luminance(paper)].sort((a, b) => a - b);
    const contrast = (high + 0.05) / (low + 0.05);
    if (contrast < 4.5 || faded) found.push([contrast.toFixed(2), style.color, String(paper), faded, node.textContent.trim().slice(0, 40)]);
  }
  return found;
})()"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with held-out scores, a readable document, and a model that writes white space."""
    folder = make_run(tmp_path_factory.mktemp("runs") / "run", 120)
    scores = {"loss": 4.905, "perplexity": 135.0, "accuracy": 0.241, "bits_per_byte": 1.93, "samples": 1200}
    better = scores | {"loss": 4.758, "perplexity": 116.5, "bits_per_byte": 1.871}
    _write_lines(folder / "evaluations.jsonl", [
        {"step": 60, "corpus": "local", "scores": {"all": scores | {"loss": 6.1}}},
        {"step": 120, "corpus": "local", "scores": {"all": scores}, "averaged": {"all": better}}])  # fmt: skip
    with open(folder / "prompts.jsonl", "a") as file:
        file.write(json.dumps({"step": 119, "texts": [{"prompt": "In 1815", "output": " \n" * 80}]}) + "\n")
    with open(folder / "samples.jsonl", "a") as file:
        file.write(
            json.dumps({"step": 119, "input": "a", "output": "\n" * 40, "accuracy": 0.0, "continuation": "b"}) + "\n"
        )
    # A text in words at step 88, its tokens from certain to a blind guess: every colour of the scale.
    path = folder / "passports.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    place = next(k for k, line in enumerate(lines) if line["step"] >= 80)
    rows = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    step = next(row["step"] for row in rows[80:] if row["tokens"] == 256)
    spread = [round(9 * k / 254, 5) for k in range(255)]
    lines[place] = {"step": step, "input_ids": [1] * 256, "pieces": ["word "] * 256, "before": spread,
                    "after": [round(value - 1.2 + 2.4 * k / 254, 5) for k, value in enumerate(spread)]}  # fmt: skip
    _write_lines(path, sorted(lines, key=lambda line: line["step"]))
    (folder / "readable").write_text(str(step))
    report.write(folder)
    return folder


@pytest.fixture
def shown(run: Path, tab: Browser) -> Browser:
    tab.errors.clear()
    tab.size(1280, 900)
    tab.scheme("light")
    tab.call("Page.navigate", url="about:blank")
    tab.open((run / "report.html").as_uri())
    return tab


@needs_browser
def test_it_opens_at_its_end(run: Path, shown: Browser) -> None:
    scores = shown.value(
        "[...document.querySelectorAll('#held-out tr')].slice(1).map(row => [...row.cells].map(cell => cell.textContent))"
    )
    assert scores == [["weights", "4.905", "24.1 %", "1.930"], ["averaged weights", "4.758", "24.1 %", "1.871"]]
    assert shown.text("#held-out-note") == "1,200 documents that no step learns, scored after 120 updates."
    first = "document.querySelector('#held-out').getBoundingClientRect().bottom <= document.querySelector('.figures').getBoundingClientRect().top"
    assert shown.value(first), "the held-out scores come before the training's"
    # Without a script the same is there.
    page = (run / "report.html").read_text()
    assert 'id="held-out-averaged-loss">4.758<' in page and 'id="held-out-raw-loss">4.905<' in page
    assert shown.text("#step-title") == (run / "readable").read_text()
    assert shown.text("#reading .document").startswith("word word")
    # The newest prompts and sample, white space in words.
    assert "as of step 119" in shown.text("#writing-note")
    assert "(160 characters of white space)" in shown.text("#prompts")
    assert shown.text("#sample-output") == "(40 characters of white space)"
    assert shown.value("location.hash") == "", "opened anew it opens the same way"
    go(shown, 29)
    assert "as of step 10" in shown.text("#writing-note"), "whoever moves the step sees what was written by then"
    assert shown.errors == []


def test_the_document_of_the_opening_is_late_readable_and_usual() -> None:
    def passport(step: int, text: str, nats: float, **more: object) -> dict[str, object]:
        return {"step": step, "pieces": [text] * 40, "input_ids": [0] * 40, "before": [nats] * 39, **more}

    after: dict[str, object] = {"after": [0.0] * 39}
    words, numbers = " word", " 12.5"
    found = [passport(10, words, 3.0, **after), passport(60, words, 4.0, **after), passport(70, words, 8.0, **after),
             passport(80, numbers, 4.0, **after), passport(90, words, 4.0)]  # fmt: skip
    assert documents.late_and_readable(found, 100) == 60, (
        "not the early, the hard, the numbers, the one without guesses"
    )
    assert documents.late_and_readable([found[4]], 100) == 90
    assert documents.late_and_readable([found[0]], 100) is None


@needs_browser
def test_what_a_step_taught_is_what_the_ledger_and_the_summary_say(run: Path, shown: Browser) -> None:
    columns = read_columns(run / "ledger.jsonl")
    whole, _ = teaching.of_columns(columns)
    assert whole.own.mean is not None and whole.own.error is not None
    _, arrays = content.gather(RunFolder(run), Reader(run / "ledger.jsonl"))
    rows = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    expected = [row["loss"] - row["loss_after"] if row["step"] >= 9 and row["loss"] else math.nan for row in rows]
    np.testing.assert_allclose(arrays["taught"], expected, atol=1e-5)
    told = f"{whole.own.mean:.4f} ± {whole.own.error:.4f}"
    assert (teaching.in_words(whole, []) or "").startswith(
        f"an update changes the loss of its own document by -{told} "
    ), "the summary's sentence"
    caption = shown.text("#chart-taught .caption")
    assert f"the document that it learned by {told}" in caption
    assert f"{whole.own.count} updates measured, those of the warm-up left out" in caption
    following = np.array([rows[k]["next_loss"] - rows[k + 1]["loss"] for k in range(9, 119) if rows[k + 1]["loss"]])
    error = following.std(ddof=1) / len(following) ** 0.5
    assert f"{following.mean():.4f} ± {error:.4f}" in caption
    go(shown, 3)  # in the warm-up, where nothing counts
    assert shown.text("#chart-taught .readout") == told
    assert shown.value("!document.querySelector('#chart-taught').hidden")


@needs_browser
def test_the_line_of_a_chart_is_the_mean_of_the_steps_around(run: Path, shown: Browser) -> None:
    from slimpajama_hf.views.drawing import centred_mean

    values = read_columns(run / "ledger.jsonl").grad_norm
    shown.value(
        "(() => { const s = document.querySelector('#window'); s.value = 50; s.dispatchEvent(new Event('change')); })()"
    )
    means = centred_mean(values, 50)
    for step in (0, 7, 24, 25, 60, 95, 119):
        go(shown, step)
        told = shown.text("#chart-gradient .readout").split("mean ")[1]
        assert float(told) == pytest.approx(means[step], abs=6e-4)


@needs_browser
def test_a_mean_is_never_of_more_steps_than_there_are(tab: Browser, tmp_path: Path) -> None:
    path = report.write(make_run(tmp_path / "run", 12))
    tab.call("Page.navigate", url="about:blank")
    tab.open(path.as_uri())
    assert tab.value("[...document.querySelectorAll('#window option')].every(option => option.value <= 12)")
    assert "last 12 steps" in tab.text(".figures") and "last 50 steps" not in tab.text(".figures")


@needs_browser
def test_on_paper_the_curves_fit_and_are_light(shown: Browser, tmp_path: Path) -> None:
    shown.scheme("dark")
    shown.frame()
    shown.value("""addEventListener('beforeprint', () => { window.printed = {
      paper: getComputedStyle(document.body).backgroundColor,
      charts: [...document.querySelectorAll('.chart:not([hidden])')].map(chart => [chart.getBoundingClientRect().width, chart.querySelector('canvas').getBoundingClientRect().width]),
      right: Math.max(...[...document.querySelectorAll('main canvas, main table, main p, main dl')].filter(node => node.checkVisibility()).map(node => node.getBoundingClientRect().right)) - document.body.getBoundingClientRect().left,
    } })""")  # fmt: skip
    width, height = PAPER
    done = shown.call("Page.printToPDF", paperWidth=width, paperHeight=height, preferCSSPageSize=True, timeout=120)
    pdf = base64.b64decode(done["data"])
    printed = shown.value("window.printed")
    room = (width - 2 * 14 / 25.4) * 96
    assert printed["paper"] == "rgb(252, 251, 248)", "light"
    assert len(printed["charts"]) >= 9 and all(canvas <= chart + 1 <= room for chart, canvas in printed["charts"])
    assert printed["right"] <= room + 1
    assert pdf.startswith(b"%PDF")
    # After it the page is as it was.
    shown.frame()
    assert shown.value("getComputedStyle(document.body).backgroundColor") == "rgb(21, 24, 28)"
    assert shown.value("document.querySelector('#chart-loss canvas').getBoundingClientRect().width") > room
    shown.scheme("light")
    assert shown.errors == []


@needs_browser
def test_on_paper_a_long_document_is_whole(shown: Browser) -> None:
    shown.open(shown.value("location.href"))
    cut = """(() => { const box = document.querySelector('.document'); const line = box.firstElementChild;
      for (let i = 0; i < 400; i++) box.insertBefore(document.createTextNode('\\n'), line);
      return box.scrollHeight - box.clientHeight; })()"""
    assert shown.value(cut) > 100, "on the screen it is a window that scrolls"
    shown.call("Emulation.setEmulatedMedia", media="print")
    shown.frame()
    assert shown.value("(box => box.scrollHeight - box.clientHeight)(document.querySelector('.document'))") <= 1
    shown.call("Emulation.setEmulatedMedia", media="")
    shown.open(shown.value("location.href"))


@needs_browser
def test_one_polite_region_speaks_once(shown: Browser) -> None:
    live = "[...document.querySelectorAll('output, [aria-live], [role=status], [role=alert], [role=log]')].map(node => [node.id, node.getAttribute('aria-live')])"
    assert shown.value(live) == [["said", "polite"]]
    shown.value(
        "window.heard = []; new MutationObserver(() => heard.push(document.querySelector('#said').textContent)).observe(document.querySelector('#said'), {childList: true})"
    )
    for _ in range(5):
        shown.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowLeft")
    step = shown.text("#step-title")
    shown.until("heard.length")
    assert shown.value("heard.length") == 1
    said = shown.text("#said")
    assert said.startswith(f"Step {shown.text('#step-title')}: loss {shown.text('#passport-loss')}"), step
    labels = shown.value(
        "[...document.querySelectorAll('.plot:not(.still)')].filter(plot => plot.checkVisibility()).map(plot => plot.getAttribute('aria-label'))"
    )
    assert labels[0].startswith("Loss, nats per token, by step: ") and "at step 119." in labels[0]


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_by_4_5_to_1(shown: Browser, scheme: str) -> None:
    shown.scheme(scheme)
    shown.frame()
    shown.value("document.querySelector('.chip').click()")  # one that is switched off
    for mode in ("before", "after", "taught"):
        shown.value(f"document.querySelector('[data-mode={mode}]').click()")
        shown.frame()
        assert shown.value(PALE_TEXTS) == []
    shown.value("document.querySelector('.chip').click()")
    shown.scheme("light")


@needs_browser
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_axe_finds_nothing(shown: Browser, scheme: str, width: int) -> None:
    try:
        source = axe.script()
    except axe.NotHereError as error:
        pytest.skip(str(error))
    shown.size(width, 900)
    shown.scheme(scheme)
    shown.frame()
    shown.value(f"{source};0")
    found = shown.value(
        "axe.run(document).then(({violations}) => violations.map(v => [v.id, v.help, ...v.nodes.map(node => node.html.slice(0, 120))]))"
    )
    shown.scheme("light")
    assert found == []


@needs_browser
def test_captions_hold_in_the_dark(shown: Browser) -> None:
    """No words of pale and dark, which turn round with the colours of the page; keys that name the steps instead."""
    shown.scheme("dark")
    shown.frame()
    said = shown.text("#breakdowns")
    assert not re.search(r"\b(pale|dark|darker|light|lighter)\b", said)
    assert re.search(r"steps 0 to \d+", said) and "steps 90 to 119" in said
    charts = shown.value(
        "[...document.querySelectorAll('#charts .chart:not([hidden])')].map(chart => chart.querySelector('.caption').textContent.length)"
    )
    assert all(length > 30 for length in charts), "every chart says what it shows"
    shown.scheme("light")
