"""The mark of a run folder: given by this user's key, to this content."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from slimpajama_hf.record import ownership
from slimpajama_hf.record.run_folder import RunFolder
from slimpajama_hf.settings import what_matters


@pytest.fixture
def run(finished, tmp_path, monkeypatch) -> RunFolder:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folder = RunFolder(Path(shutil.copytree(finished, tmp_path / "run")))
    ownership.sign(folder)
    return folder


def test_a_run_is_own_until_something_is_changed_by_another_hand(run):
    assert ownership.is_own(run)
    assert ownership.key_file().stat().st_mode & 0o077 == 0 and len(ownership.key_file().read_bytes()) == 32
    kept = run.config.read_text()
    run.config.write_text(kept + "push_to_hub: true\n")
    assert not ownership.is_own(run)
    run.config.write_text(kept)
    assert ownership.is_own(run)
    record = json.loads(run.record.read_text())
    record["corpus"]["files"] = [["x", "/etc/passwd"]]
    run.record.write_text(json.dumps(record))
    assert not ownership.is_own(run)


def test_another_users_mark_is_none(run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another"))
    assert not ownership.is_own(run)
    ownership.sign(run)
    assert ownership.is_own(run)


def test_where_there_is_no_place_for_a_key_nothing_is_marked_and_nothing_believed(run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file" / "in-it"))
    before = (run.path / "_made_here").read_bytes()
    ownership.sign(run)
    assert not ownership.is_own(run) and (run.path / "_made_here").read_bytes() == before


def test_what_decides_is_all_that_a_resume_may_not_change_and_nothing_that_reaches_the_outside():
    config = dict.fromkeys(what_matters.WHAT_MATTERS, 1) | {
        "push_to_hub": True, "hub_model_id": "a/b", "hub_token": "x", "report_to": ["wandb"], "output_dir": "x",
        "eval_dataset": "/secret", "save_steps": 5, "save_total_limit": 1, "viz_interval": 1, "epochs": 2,
    }  # fmt: skip
    assert set(what_matters.what_decides(config)) == {*what_matters.WHAT_MATTERS, "epochs"}
    assert what_matters.digest(config) == what_matters.digest(config | {"dataset": "elsewhere", "push_to_hub": False})
    assert what_matters.digest(config) != what_matters.digest(config | {"seed": 2})
