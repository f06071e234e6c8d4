"""`--tokenizer corpus:N`: trained on the run's own corpus before step 0, and the same at every resume."""

from __future__ import annotations

import json
import re
import shutil
import sysconfig
from pathlib import Path

import pytest

from slimpajama_hf.lookback import checks
from slimpajama_hf.record import ledger
from slimpajama_hf.samples.tokenizer import load_tokenizer
from tests.conftest import NANO_UNSEEN, read_ledger, run_command, run_script, write_records

SIZE = 500


def rows(run):
    return [{k: v for k, v in row.items() if k not in ledger.TIME_FIELDS} for row in read_ledger(run)]


def flags(shards, run, *more):
    return [
        *NANO_UNSEEN, "--dataset", f"{shards}/*.jsonl.zst", "--tokenizer", f"corpus:{SIZE}", "--precision", "float32",
        "--max_steps", "12", "--save_steps", "6", "--warmup_steps", "4", "--output_dir", str(run), *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    run = tmp_path_factory.mktemp("own") / "run"
    done = run_script(*flags(shards, run))
    assert done.returncode == 0, done.stderr
    return run, done.stderr


def test_it_is_trained_said_recorded_and_in_every_checkpoint(whole):
    run, said = whole
    assert f"tokenizer of {SIZE} tokens trained on the first 90 documents" in said
    assert f"corpus:{SIZE}, {SIZE} tokens" in said
    kept = load_tokenizer(str(run / "tokenizer"))
    assert len(kept) == SIZE
    text = "naïve  café\n\ttwo  spaces, 日本語 and a \x07 bell"
    assert kept.decode(kept.encode(text)) == text
    for step in (6, 12):
        saved = load_tokenizer(str(run / f"checkpoint-{step}"))
        assert saved.get_vocab() == kept.get_vocab() and saved.encode(text) == kept.encode(text)
    # What it was trained on is read as usual.
    assert [row["row"] for row in read_ledger(run)[:4]] == [0, 1, 2, 3]
    assert checks.verify(run).ok


@pytest.mark.long
def test_a_run_that_goes_on_trains_none_and_is_the_unbroken_run(whole, shards, tmp_path):
    run, _ = whole
    short = tmp_path / "short"
    assert run_script(*flags(shards, short), "--max_steps", "6").returncode == 0
    on = run_script("--output_dir", str(short), "--resume_from_checkpoint", "true", "--max_steps", "12")
    assert on.returncode == 0, on.stderr
    assert "trained on the first" not in on.stderr
    assert rows(short) == rows(run)
    weights = "checkpoint-12/model.safetensors"
    assert (short / weights).read_bytes() == (run / weights).read_bytes()
    assert (short / "checkpoint-12" / "tokenizer.model").read_bytes() == (
        run / "tokenizer" / "tokenizer.model"
    ).read_bytes()


@pytest.mark.long
def test_without_a_checkpoint_it_is_taken_from_the_folder_of_the_run(whole, shards, tmp_path):
    run, _ = whole
    alone = tmp_path / "alone"
    shutil.copytree(run, alone, ignore=shutil.ignore_patterns("checkpoint-*"))
    shown = run_command("inspect", str(alone), "--step", "3")
    assert shown.returncode == 0, shown.stderr
    again = run_script("--output_dir", str(alone), "--resume_from_checkpoint", "true")
    assert again.returncode == 0, again.stderr
    assert "trained on the first" not in again.stderr and rows(alone) == rows(run)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A folder of 12 MB of text that lies on every machine with a Python."""
    folder = tmp_path_factory.mktemp("large")
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py"))
    texts = (path.read_text("utf-8", errors="ignore") for path in sources if "site-packages" not in path.parts)
    length, lines = 0, []
    for text in texts:
        for start in range(0, len(text), 4000):
            lines.append(json.dumps({"text": text[start : start + 4000]}))
            length += len(lines[-1])
        if length > 12e6:
            break
    (folder / "texts.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.long
def test_local_files_with_enough_text_have_a_tokenizer_of_their_own_unasked(large, tmp_path):
    run = tmp_path / "run"
    nano = [word for word in NANO_UNSEEN if word not in ("--tokenizer", "builtin")]
    asked = [*nano, "--dataset", str(large), "--max_steps", "4", "--save_steps", "2", "--output_dir", str(run)]
    done = run_script(*asked)
    assert done.returncode == 0, done.stderr
    assert "tokenizer of 8,192 tokens trained on the first" in done.stderr and "corpus:8192" in done.stderr
    assert json.loads((run / "run.json").read_text())["tokenizer"] == "corpus:8192"
    on = run_script("--output_dir", str(run), "--resume_from_checkpoint", "true", "--max_steps", "6")
    assert on.returncode == 0 and "trained on the first" not in on.stderr, on.stderr
    assert checks.verify(run).ok
    named = run_script(*asked, "--tokenizer", "builtin", "--overwrite_output_dir")
    assert named.returncode == 0 and "trained on the first" not in named.stderr, named.stderr


def test_local_files_with_less_have_the_built_in_one(shards, tmp_path):
    nano = [word for word in NANO_UNSEEN if word not in ("--tokenizer", "builtin")]
    run = tmp_path / "run"
    done = run_script(*nano, "--dataset", f"{shards}/*.jsonl.zst", "--max_steps", "2", "--output_dir", str(run))
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "run.json").read_text())["tokenizer"] == "builtin"


def test_text_too_monotonous_for_so_many_tokens_has_the_built_in_one_and_says_so(tmp_path):
    nano = [word for word in NANO_UNSEEN if word not in ("--tokenizer", "builtin")]
    words = "the same few words again and again " * 2200
    write_records(tmp_path / "a.jsonl", [{"text": f"{number} {words}"} for number in range(120)])
    asked = [*nano, "--dataset", str(tmp_path / "a.jsonl"), "--max_steps", "2", "--output_dir", str(tmp_path / "run")]
    done = run_script(*asked)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/run.json").read_text())["tokenizer"] == "builtin"
    assert re.search(
        r"no tokenizer of its own for .*a.jsonl: a vocabulary of 8192 .* the built-in one is used", done.stderr
    )
    # A number that was named is no wish that another may take the place of.
    named = run_script(*asked, "--tokenizer", "corpus:8192", "--overwrite_output_dir")
    assert named.returncode == 1 and "more than" in named.stderr


@pytest.mark.long
def test_two_processes_have_the_one_tokenizer(whole, shards, tmp_path):
    from tests.conftest import python

    run, _ = whole
    two = tmp_path / "two"
    done = python(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "run_clm_slimpajama.py",
        *flags(shards, two, "--max_steps", "3"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("trained on the first") == 1
    assert (two / "tokenizer" / "tokenizer.model").read_bytes() == (run / "tokenizer" / "tokenizer.model").read_bytes()
    samples = [sample["text_sha1"] for row in read_ledger(two) for sample in row["samples"]]
    assert samples == [row["text_sha1"] for row in read_ledger(run)[:6]]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("corpus:many", "--tokenizer corpus:many: expected corpus or corpus:N, a number of tokens, as corpus:8192"),
        ("corpus:-5", "--tokenizer corpus:-5: expected corpus or corpus:N"),
        ("corpus:100", "cannot hold the 256 bytes"),
        ("corpus:90000", "is more than 90 documents"),
    ],
)
def test_a_number_that_cannot_be_is_a_sentence_that_says_what_to_type(shards, tmp_path, asked, words):
    done = run_script(*NANO_UNSEEN, "--dataset", f"{shards}/*.jsonl.zst", "--tokenizer", asked, "--max_steps", "2",
                      "--output_dir", str(tmp_path / "run"))  # fmt: skip
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert words in done.stderr and "--vocab_size" not in done.stderr and "corpus:" in done.stderr


@pytest.mark.long
def test_another_number_that_a_resume_allows_is_another_tokenizer(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    on = [
        "--output_dir",
        str(run),
        "--resume_from_checkpoint",
        "true",
        "--max_steps",
        "14",
        "--tokenizer",
        "corpus:480",
    ]
    refused = run_script(*on)
    assert refused.returncode != 0 and "--tokenizer corpus:480 (begun with corpus:500)" in refused.stderr
    allowed = run_script(*on, "--allow_changes", "tokenizer")
    assert "tokenizer of 480 tokens trained on the first" in allowed.stderr
    # There is no way from weights for 500 tokens to a model of 480.
    assert allowed.returncode == 1 and "Traceback" not in allowed.stderr, allowed.stderr
    assert (
        "its transformer.wte.weight is [500, 32]" in allowed.stderr
        and "that of the model is [480, 32]" in allowed.stderr
    )


def test_a_layer_more_that_a_resume_allows_has_no_weights_to_go_on_with(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    done = run_script(
        "--output_dir", str(run), "--resume_from_checkpoint", "true", "--max_steps", "14", "--config_overrides",
        "n_layer=2,n_embd=32,n_head=2", "--allow_changes", "config_overrides",
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "its transformer.h.1.ln_1.weight is not there, and that of the model is [32]" in done.stderr


@pytest.mark.long
def test_a_record_that_cannot_be_read_is_met_by_the_stream_and_not_by_the_search_for_text(tmp_path):
    """What lies before it is learned, as with a tokenizer that is named."""
    records = [json.dumps({"text": f"document {number} of some words"}) for number in range(6)]
    (tmp_path / "torn.jsonl").write_text("\n".join([*records, '{"text": "half a rec', *records]))
    nano = [word for word in NANO_UNSEEN if word not in ("--tokenizer", "builtin")]
    said = {}
    for name, more in (("auto", []), ("named", ["--tokenizer", "builtin"])):
        run = tmp_path / name
        done = run_script(*nano, "--dataset", str(tmp_path / "torn.jsonl"), "--output_dir", str(run), *more)
        said[name] = done.returncode, len(read_ledger(run))
    assert said["auto"] == said["named"] and said["auto"][1] >= 6
