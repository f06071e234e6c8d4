"""The scripts of `examples/`: two lines more, and killed wherever it may be they go on as if nothing had been."""

from __future__ import annotations

import difflib
import json
import shutil
from pathlib import Path

import pytest
import torch

from slimpajama_hf import report
from slimpajama_hf.errors import UserError
from slimpajama_hf.lookback import checks, comparison, inspection, replay, rewind
from slimpajama_hf.views import views
from tests.anywhere import scripts
from tests.anywhere.conftest import STEPS
from tests.conftest import read_ledger, run_command, run_script


def test_a_strangers_script_needs_two_lines():
    """40 lines by the stock Trainer; with exact resume and the report two lines more, and not one changed."""
    stock, with_it = (
        (scripts.EXAMPLES / f"trainer_{name}.py").read_text().splitlines() for name in ("stock", "two_lines")
    )
    changes = [line for line in difflib.ndiff(stock, with_it) if line[:1] in "+-"]
    assert len(stock) == 40
    assert [line[0] for line in changes] == ["+", "+"], changes


def test_no_example_is_longer_than_a_page():
    assert all(len(path.read_text().splitlines()) <= 42 for path in scripts.EXAMPLES.glob("*.py"))


def _killed(name: str, kills: int, seed: int, texts: str, tokenizer: Path, tmp_path: Path, unbroken: Path) -> None:
    """Killed so often, an example leaves what it leaves unbroken: documents, ledger, weights."""
    run = tmp_path / name
    moments = scripts.until_the_end(name, texts, tokenizer, run, STEPS, kills, seed)
    learned = scripts.documents(run)
    assert learned == scripts.documents(unbroken), moments
    assert len(learned) == len(set(learned)), moments
    rows, expected = read_ledger(run), read_ledger(unbroken)
    assert len(rows) == STEPS and rows[-1]["chain"] == expected[-1]["chain"], moments
    own, others = scripts.weights(run), scripts.weights(unbroken)
    assert own.keys() == others.keys() and all(torch.equal(own[key], others[key]) for key in own), moments


# A loop of one's own and a Trainer with two lines more; the others in the long version.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n in ("trainer_two_lines", "pytorch_loop") else pytest.mark.slow)
        for n in scripts.SCRIPTS
    ],
)
@pytest.mark.long
def test_killed_twice_it_leaves_what_it_leaves_unbroken(name, texts, tokenizer, tmp_path, unbroken):
    if not scripts.is_there(name):
        pytest.skip("trl is not installed here; `make test-clients` runs it")
    _killed(name, 2, 1, texts, tokenizer, tmp_path, unbroken(name))


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", scripts.SCRIPTS)
def test_killed_twenty_times_it_leaves_what_it_leaves_unbroken(name, texts, tokenizer, tmp_path, unbroken, fault_table):
    if not scripts.is_there(name):
        pytest.skip("trl is not installed here; `make test-clients` runs it")
    _killed(name, 20, 2, texts, tokenizer, tmp_path, unbroken(name))
    fault_table(f"kill -9 of examples/{name}.py", 20, bit_equal=True)


@pytest.mark.parametrize("name", ["trainer_two_lines", pytest.param("pytorch_loop", marks=pytest.mark.slow)])
@pytest.mark.long
def test_the_commands_know_such_a_run(name, unbroken, tmp_path):
    """What reads ledgers reads these; what would train again says in a sentence why it does not."""
    run = unbroken(name)
    assert (run / "report.html").is_file() and list((run / "training_viz").glob("*.png"))
    assert report.write(run).is_file()
    assert "a script of its own" in views.caption_of(json.loads((run / "run.json").read_text()))[1]
    verified = checks.verify(run)
    assert verified.ok, verified.lines
    step = inspection.inspect(run, 3, sample=1)
    assert step.tokens and step.documents[0].sha1 == read_ledger(run)[3]["samples"][1]["text_sha1"]
    other = shutil.copytree(run, tmp_path / "other")
    (parting,) = comparison.compare([str(run), str(other)]).partings
    assert parting.same_steps == STEPS and not parting.fields
    for again in (lambda: replay.replay(run, 1, 3), lambda: rewind.rewind(str(run), 1, 2)):
        with pytest.raises(UserError, match="a script of its own trained this run"):
            again()


@pytest.mark.long
def test_the_command_line_says_it_without_a_traceback(unbroken):
    run = str(unbroken("pytorch_loop"))
    done = run_command("inspect", run, "--find", "river")
    assert done.returncode == 0 and "was read at" in done.stdout, done.stderr
    done = run_script("--output_dir", run, "--resume_from_checkpoint", "true")
    assert done.returncode == 1 and "a script of its own trained this run" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
