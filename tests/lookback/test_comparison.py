"""`python -m slimpajama_hf compare RUN RUN...`: numbers that follow from the ledgers, and a picture of them."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from slimpajama_hf import __main__, terminal
from slimpajama_hf.commands import compare
from slimpajama_hf.errors import UsageError, UserError
from slimpajama_hf.lookback import comparison, comparison_chart
from slimpajama_hf.record import ledger
from tests.conftest import read_ledger


def altered(run: Path, target: Path, change: Any, **config: Any) -> Path:
    """A run folder (ledger, record, configuration alone) with its rows changed by `change(rows)`, all hashes right."""
    target.mkdir(parents=True)
    shutil.copyfile(run / "run.json", target / "run.json")
    text = (run / "run_config.yaml").read_text()
    for name, value in config.items():
        text = "\n".join(line for line in text.splitlines() if not line.startswith(f"{name}:")) + f"\n{name}: {value}\n"
    (target / "run_config.yaml").write_text(text)
    rows, chain = change(read_ledger(run)), ledger.CHAIN_START
    for row in rows:
        chain = row["chain"] = ledger.chain_hash(chain, row)
    (target / "ledger.jsonl").write_text("".join(ledger.encode(row) + "\n" for row in rows))
    return target


def from_step(step: int, **fields: Any) -> Any:
    """Rows with some fields multiplied from a step on."""
    return lambda rows: [
        row | {name: row[name] * factor for name, factor in fields.items()} if row["step"] >= step else row for row in rows
    ]  # fmt: skip


@pytest.fixture
def runs(finished: Path, tmp_path: Path) -> list[Path]:
    """The finished run; one that parts from it at step 15; a slower one of 25 steps and another seed."""
    return [
        finished,
        altered(finished, tmp_path / "parted", from_step(15, loss=0.9)),
        altered(finished, tmp_path / "slow", lambda rows: from_step(0, step_seconds=3, loss=1.01)(rows)[:25], seed=7),
    ]


def test_the_table_follows_from_the_ledgers(runs):
    table = comparison.compare([str(run) for run in runs]).table()
    ledgers = [read_ledger(run) for run in runs]
    steps, tokens, seconds = (min(sum(field(row) for row in rows) for rows in ledgers)
                              for field in (lambda _: 1, lambda row: row["tokens"], lambda row: row["step_seconds"]))  # fmt: skip
    assert [entry["seed"] for entry in table] == [42, 42, 7]
    for entry, rows in zip(table, ledgers, strict=True):
        total = sum(row["tokens"] for row in rows)
        clock = sum(row["step_seconds"] for row in rows)
        assert (entry["steps"], entry["tokens"]) == (len(rows), total)
        assert entry["seconds"] == pytest.approx(clock) and entry["throughput"] == pytest.approx(total / clock)
        assert entry["final_loss"] == pytest.approx(np.mean([row["loss"] for row in rows][-50:]))
        assert entry["final_accuracy"] == pytest.approx(np.mean([row["accuracy"] for row in rows][-50:]))
        bits, size = sum(row["code_bits"] for row in rows), sum(row["text_bytes"] for row in rows)
        assert entry["bits_per_byte"] == pytest.approx(bits / size)
        sums = [np.cumsum([row[name] for row in rows]) for name in ("tokens", "step_seconds")]
        for axis, done in (("steps", steps), ("tokens", (sums[0] <= tokens).sum()), ("seconds", (sums[1] <= seconds * (1 + 1e-9)).sum())):  # fmt: skip
            assert entry[f"loss_at_equal_{axis}"] == pytest.approx(np.mean([row["loss"] for row in rows[:done]]))


def test_two_runs_of_one_seed_part_where_their_ledgers_do(runs):
    found = comparison.compare([str(run) for run in runs])
    (parting,) = found.partings  # the third has another seed
    assert (parting.same_steps, set(parting.fields)) == (15, {"loss"})
    assert parting.words() == "finished and parted have one seed and part at step 15 (loss)"
    assert found.to_dict()["partings"][0]["parts_at"] == 15


def test_a_run_that_is_the_beginning_of_another_does_not_part(finished, tmp_path):
    short = altered(finished, tmp_path / "short", lambda rows: rows[:12])
    (parting,) = comparison.compare([str(finished), str(short)]).partings
    assert not parting.fields and parting.words().endswith("are the same for 12 steps")


def test_the_command_draws_a_chart_and_prints_the_table(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["compare", *map(str, runs)]
    before = sorted(tmp_path.iterdir())
    assert __main__.main(words) == 0
    written = capsys.readouterr()
    assert sorted(tmp_path.iterdir()) == before and "add --output FILE.png" in written.err
    assert "prequential bits per byte" in written.out and "part at step 15" in written.out
    assert __main__.main([*words, "--output", "other.png", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["equal"]["steps"] == 25
    with Image.open(tmp_path / "other.png") as picture:
        assert picture.format == "PNG" and picture.width == 2000


def test_the_end_of_a_longer_run_is_not_called_better(runs, finished, tmp_path):
    best = {title: best for title, _, best in comparison.lines_of(comparison.compare([str(run) for run in runs]))}
    assert [best[title] for title in best if title.startswith(("final", "prequential"))] == [None] * 3
    # At equal steps they can be compared, and so can runs of one length.
    assert best["loss at 25 steps"] == 1
    other = altered(finished, tmp_path / "worse", from_step(0, loss=1.5))
    best = {title: best for title, _, best in comparison.lines_of(comparison.compare([str(finished), str(other)]))}
    assert best["final loss, nats per token"] == 0


def centred(losses, window):
    """Means of the `window` losses around each, as many ahead as behind at the start; at the end what is there."""
    behind, ahead = window // 2, window - 1 - window // 2
    return [np.mean(losses[max(0, place - behind) : place + min(place, ahead) + 1]) for place in range(len(losses))]


def test_the_chart_has_a_line_for_each_run_on_each_axis(runs):
    found = comparison.compare([str(run) for run in runs])
    figure = comparison_chart.draw(found)
    assert [ax.get_gid() for ax in figure.axes] == ["steps", "tokens", "seconds"]
    for ax, axis in zip(figure.axes, ("steps", "tokens", "seconds"), strict=True):
        lines = {line.get_gid(): line for line in ax.lines}
        assert {"run 0", "run 1", "run 2", "parts 1", "reached"} == lines.keys()
        for number, course in enumerate(found.courses):
            np.testing.assert_array_equal(lines[f"run {number}"].get_xdata(), course.axis(axis))
            np.testing.assert_allclose(lines[f"run {number}"].get_ydata(), centred(course.columns.loss, 50))
        assert len({line.get_color() for gid, line in lines.items() if gid.startswith("run")}) == 3
    texts = " ".join(text.get_text() for text in figure.texts)
    assert "part at step 15" in texts and "finished" in texts


def test_many_runs_short_runs_and_lost_losses_are_drawn(finished, tmp_path):
    """17 runs, one of a single step, one whose losses are no numbers, one with a name that steers a terminal."""
    lost = lambda rows: [row | {"loss": None, "code_bits": None, "accuracy": None} for row in rows]  # noqa: E731
    runs = [altered(finished, tmp_path / f"run-{n}", from_step(n + 1, loss=1 + n / 50), seed=n // 4) for n in range(14)]
    runs += [altered(finished, tmp_path / "one", lambda rows: rows[:1]), altered(finished, tmp_path / "lost", lost)]
    runs.append(altered(finished, tmp_path / "x\x1b[31m", from_step(3, loss=1.1)))
    found = comparison.compare([str(run) for run in runs])
    assert found.table()[-2]["final_loss"] is None
    content = comparison_chart.render(found)
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.height < 2000
    styles = [comparison_chart.line_style(number) for number in range(len(runs))]
    assert len(set(styles)) == len(runs)
    drawn = terminal.console()
    for columns in (80, 120):
        drawn.width = columns
        with drawn.capture() as capture:
            compare.show(drawn, found)
        text = capture.get()
        assert max(map(len, text.split("\n"))) <= columns and "\x1b" not in text
        assert all(name in text for name in ("run-0", "run-13", "lost"))


def test_names_are_as_long_as_they_must_be(tmp_path):
    paths = [str(tmp_path / name) for name in ("a/run", "b/run", "c/other")]
    assert comparison.short_names(paths) == ["a/run", "b/run", "c/other"]
    assert comparison.short_names(paths[1:]) == ["run", "other"]
    with pytest.raises(UsageError, match="named twice"):
        comparison.short_names([paths[0], paths[0] + "/"])


def test_what_cannot_be_compared_is_one_sentence(finished, tmp_path):
    with pytest.raises(UsageError, match="expected two runs or more"):
        comparison.compare([str(finished)])
    with pytest.raises(UserError, match=r"no run\.json in it"):
        comparison.compare([str(finished), str(tmp_path)])
    empty = altered(finished, tmp_path / "empty", lambda rows: [])
    with pytest.raises(UserError, match="no step in its ledger yet"):
        comparison.compare([str(finished), str(empty)])
    with pytest.raises(UsageError, match=r"expected a name that ends with \.png"):
        __main__.main(["compare", str(finished), str(empty), "--output", "chart.jpg"])
    short = altered(finished, tmp_path / "short", lambda rows: rows[:5])
    with pytest.raises(UserError, match="cannot be written"):
        __main__.main(["compare", str(finished), str(short), "--output", str(tmp_path / "no" / "such" / "folder.png")])
