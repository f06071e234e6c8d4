"""Whoever comes from `train_slimpajama.py` is told what each of its flags is now."""

from __future__ import annotations

import re

import pytest

from slimpajama_hf.errors import UsageError
from slimpajama_hf.session import command_line
from slimpajama_hf.settings import old_program
from slimpajama_hf.settings.training_arguments import make_parser
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "migrating.md").read_text("utf-8")


def known_flags() -> set[str]:
    from slimpajama_hf.settings.arguments import OURS
    from slimpajama_hf.settings.training_arguments import SlimPajamaTrainingArguments

    return set(make_parser([*OURS, SlimPajamaTrainingArguments])._option_string_actions)


@pytest.mark.parametrize("name", old_program.GONE)
def test_a_flag_that_is_gone_has_a_sentence_and_a_row(name):
    typed = f"--{name.replace('_', '-')}"
    for flags in ([typed, "5"], [f"--{name}=5"]):
        with pytest.raises(UsageError) as caught:
            command_line.parse(flags)
        assert str(caught.value) == f"{typed} is gone: {old_program.GONE[name]}"
    table = PAGE.partition("These are gone")[2].partition("## Files")[0]
    row = next(row for row in table.splitlines() if f"`{typed}" in row)
    said = set(re.findall(r"--(\w+)", old_program.GONE[name]))
    # What is said to be typed exists, and the page says the same.
    commands = {"step"} if "inspect" in old_program.GONE[name] else set()
    assert said - {*old_program.RENAMED, *commands} <= {flag[2:] for flag in known_flags()}
    assert set(re.findall(r"`--(\w+)", row.split("|")[2])) <= said


def test_no_flag_of_today_is_called_gone_and_each_new_name_exists():
    known = {flag[2:].replace("-", "_") for flag in known_flags()}
    assert not known & (set(old_program.GONE) | set(old_program.RENAMED))
    assert set(old_program.RENAMED.values()) <= known


def test_the_page_has_no_other_flags_than_the_table():
    table = PAGE.partition("These are gone")[2].partition("## Files")[0]
    first = " ".join(row.split("|")[1] for row in table.splitlines() if row.startswith("| `"))
    assert {name.replace("-", "_") for name in re.findall(r"--([\w-]+)", first)} == set(old_program.GONE)


def test_its_fields_are_still_there(finished):
    import json

    from transformers import TrainerState

    metrics = json.loads((finished / "training_viz" / "metrics_history.json").read_text())
    samples = json.loads((finished / "training_viz" / "text_samples.json").read_text())
    for file, fields in re.findall(r"^\| `(metrics_history|text_samples)\.json` \| (.*?) \|", PAGE, re.M):
        there = metrics if file == "metrics_history" else samples[0]
        assert set(re.findall(r"`(\w+)`", fields)) <= set(there)
    state = TrainerState.load_from_json(str(finished / "checkpoint-40" / "trainer_state.json"))
    assert state.global_step == 40
