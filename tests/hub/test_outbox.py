"""Pushing to the Hub: the outbox on disk, the token's rights, and the stand-in server against the real client library."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from slimpajama_hf.hub.outbox import Outbox
from tests.hub.loopback_model_hub import TOKEN, Account, LoopbackModelHub

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def hub() -> Iterator[LoopbackModelHub]:
    with LoopbackModelHub() as server:
        yield server


def child(hub: LoopbackModelHub, tmp_path: Path, code: str, token: str | None = TOKEN) -> tuple[int, str]:
    """(exit code, output) of Python code in a process that takes `hub` for the Hub."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= hub.environment(token) | {"HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout + done.stderr


def checkpoint(run: Path, step: int) -> Path:
    path = run / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"%d" % step)
    return path


def test_the_outbox_keeps_the_newest_and_survives_retention_and_a_killed_uploader(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    for step in (10, 20):
        outbox.add(checkpoint(tmp_path, step))
    assert outbox.waiting() == [20]
    (tmp_path / "checkpoint-20" / "model.safetensors").unlink()
    claimed = outbox.claim()
    assert claimed is not None and claimed[0] == 20
    assert (claimed[1] / "model.safetensors").read_bytes() == b"20"
    again = Outbox(tmp_path)
    with again.lock() as held:
        assert held
        assert (tmp_path / "_outbox" / "step-20").is_dir()
        outbox.add(checkpoint(tmp_path, 30))
        assert (again.claim() or (0,))[0] == 30
        again.done(30, {"step": 30})
    assert again.waiting() == [] and again.pushed() == {"step": 30}


def test_a_step_laid_again_while_it_goes_up_takes_the_place_of_the_one_that_failed(tmp_path: Path) -> None:
    """The end of a run lays its last checkpoint again, with the final chart; the push of the first may fail then."""
    outbox = Outbox(tmp_path)
    place = checkpoint(tmp_path, 20)
    outbox.add(place)
    assert outbox.claim() is not None
    outbox.add(place)
    assert outbox.waiting() == [20]
    outbox.give_back(20)
    claimed = outbox.claim()
    assert claimed is not None and claimed[0] == 20 and outbox.waiting() == [20]
    outbox.done(20, {"step": 20})
    assert outbox.waiting() == []


def test_what_a_kill_left_half_laid_is_removed(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    outbox.add(checkpoint(tmp_path, 10))
    (tmp_path / "_outbox" / "_new.4711").mkdir()
    outbox.keep_up_to(20)
    assert sorted(path.name for path in (tmp_path / "_outbox").iterdir()) == ["step-10"]


RESOLVE = """
from slimpajama_hf.errors import UserError
from slimpajama_hf.hub.account import resolve
try:
    print("to", resolve("me/run", None).repo)
except UserError as error:
    print("refused:", error)
"""


@pytest.mark.parametrize(
    ("account", "token", "said"),
    [
        (Account(), TOKEN, "to me/run"),
        (Account(), None, "refused: --push_to_hub: there is no Hub token on this machine"),
        (Account(), "hf_wrong", "refused: --push_to_hub: the Hub refuses the token (HTTP 401)"),
        (Account(role="read"), TOKEN, "refused: --push_to_hub: the Hub token of me may only read"),
        (Account(name="you"), TOKEN, "refused: --hub_model_id me/run: the Hub token is of you"),
    ],
)
def test_a_token_that_may_not_write_is_said_in_one_sentence(
    hub: LoopbackModelHub, tmp_path: Path, account: Account, token: str | None, said: str
) -> None:
    hub.accounts = {TOKEN: account}
    code, output = child(hub, tmp_path, RESOLVE, token)
    assert code == 0 and said in output and len(output.strip().splitlines()) == 1, output
    assert TOKEN not in output


UPLOAD = """
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
api = HfApi()
api.create_repo("me/run", private=True, exist_ok=True)
api.create_commit("me/run", [CommitOperationAdd("small.json", b"{}"), CommitOperationAdd("large.bin", b"x" * 300_000)],
                  commit_message="step 10")
print(open(hf_hub_download("me/run", "large.bin"), "rb").read() == b"x" * 300_000)
"""


def test_the_stand_in_takes_a_commit_of_the_real_library_with_lfs_and_gives_it_back(
    hub: LoopbackModelHub, tmp_path: Path
) -> None:
    code, output = child(hub, tmp_path, UPLOAD)
    assert code == 0 and "True" in output, output
    repo = hub.models["me/run"]
    assert repo.titles == ["step 10"] and repo.private and repo.files["small.json"] == b"{}"
    assert hub.put_bytes == 300_000
