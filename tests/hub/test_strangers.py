"""Somebody else's run folder, and what a victim has: a token, a secret file. Nothing of it leaves, nothing is lost."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slimpajama_hf.record import checkpoints
from tests.conftest import NANO, read_ledger, run_command, run_script
from tests.hub.loopback_model_hub import TOKEN, LoopbackModelHub

SECRET = "the-victim-keeps-this-to-itself " * 40


@pytest.fixture
def hub() -> Iterator[LoopbackModelHub]:
    with LoopbackModelHub() as server:
        yield server


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "home" / "secret.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps({"text": f"{number} {SECRET}"}) + "\n" for number in range(50)))
    return path


@pytest.fixture
def evil(finished: Path, tmp_path: Path) -> Path:
    """A run that was begun by another user."""
    run = Path(shutil.copytree(finished, tmp_path / "evil"))
    (run / "_made_here").unlink()
    return run


def edit(path: Path, change: Any) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def left_the_machine(server: LoopbackModelHub) -> bytes:
    """Everything that any repository has ever got."""
    found = [data for repo in server.models.values() for tree in repo.trees.values() for data in tree.values()]
    return b"\n".join([*found, *server.blobs.values()])


def go_on(run: Path, *flags: str, **variables: str) -> Any:
    done = run_script(
        "--output_dir", str(run), "--resume_from_checkpoint", "true", "--max_steps", "44", *flags, **variables
    )
    assert "Traceback" not in done.stderr
    return done


LOOT = '\npush_to_hub: true\nhub_model_id: mallory/loot\nhub_strategy: checkpoint\nreport_to: ["tensorboard"]\n'


@pytest.mark.long
def test_where_a_strangers_run_pushes_and_what_it_reads_is_not_its_to_say(evil, secret, hub, shards):
    config = evil / "run_config.yaml"
    config.write_text(config.read_text() + LOOT + f"eval_steps: 2\neval_dataset: {json.dumps(str(secret))}\n")
    files = json.loads((evil / "run.json").read_text())["corpus"]["files"]
    edit(evil / "run.json", lambda record: record["corpus"].update(files=[["secret.jsonl", str(secret)]]))
    before = (evil / "ledger.jsonl").read_bytes()
    refused = go_on(evil, **hub.environment())
    assert refused.returncode == 1 and "name them on this machine with --dataset" in refused.stderr
    # Named in full its configuration is no more the user's word than unnamed.
    refused = go_on(evil, "--config", str(config), **hub.environment())
    assert refused.returncode == 1 and "--dataset" in refused.stderr
    assert (evil / "ledger.jsonl").read_bytes() == before
    edit(evil / "run.json", lambda record: record["corpus"].update(files=files))
    done = go_on(evil, "--dataset", f"{shards}/*.jsonl.zst", **hub.environment())
    said = done.stdout + done.stderr
    left = said.partition("not taken")[2].partition("\n")[0]
    assert {"eval_dataset", "eval_steps", "push_to_hub", "hub_model_id", "report_to"} <= set(
        left.strip().split(", ")
    ), said
    assert not hub.models and SECRET[:30].encode() not in left_the_machine(hub)
    for path in evil.rglob("*"):
        assert not path.is_file() or SECRET[:30].encode() not in path.read_bytes(), path
    assert TOKEN not in said and not (evil / "tensorboard").exists()


@pytest.mark.first(1)
@pytest.mark.parametrize(
    "url", ["SECRET", "hf://datasets/mallory/other@main/a.jsonl", "hf://datasets/me/data@main/../x"]
)
def test_a_corpus_of_the_hub_holds_files_of_its_own_repository_alone(evil, secret, hub, url):
    url = url.replace("SECRET", str(secret))
    edit(evil / "run.json", lambda record: record["corpus"].update(mirror="me/data@0123456789ab", files=[["a", url]]))
    config = evil / "run_config.yaml"
    config.write_text(config.read_text() + LOOT)
    done = go_on(evil, **hub.environment())
    assert done.returncode == 1 and "it reads me/data, and names" in done.stderr
    assert not hub.models


@pytest.mark.long
def test_what_goes_on_is_the_users_from_then_on(evil, shards):
    data = ["--dataset", f"{shards}/*.jsonl.zst"]
    done = go_on(evil, *data)
    assert done.returncode == 0 and "taken: " in done.stderr, done.stderr
    done = run_script("--output_dir", str(evil), "--resume_from_checkpoint", "true", "--max_steps", "45")
    assert done.returncode == 0 and "taken: " not in done.stderr, done.stderr
    assert [row["step"] for row in read_ledger(evil)] == list(range(45))
    # Another user of the machine has another key, and believes it as little.
    done = run_script(
        "--output_dir", str(evil), "--resume_from_checkpoint", "true", "--max_steps", "46",
        XDG_STATE_HOME=str(evil.parent / "another"),
    )  # fmt: skip
    assert done.returncode == 1 and "--dataset" in done.stderr


@pytest.mark.long
def test_a_fetched_run_pushes_nowhere_by_itself(hub, shards, tmp_path, secret):
    flags = [*NANO, "--dataset", f"{shards}/*.jsonl.zst", "--max_steps", "6", "--save_steps", "6", "--output_dir",
             str(tmp_path / "run"), "--push_to_hub", "--hub_model_id", "me/run", "--hub_patience", "1"]  # fmt: skip
    assert run_script(*flags, **hub.environment()).returncode == 0
    repo = hub.models["me/run"]
    files = repo.files | {"run_config.yaml": repo.files["run_config.yaml"] + LOOT.encode()}
    assert not [name for name in files if name.startswith("_")]
    repo.commit("evil", files)
    done = run_script(
        "--resume_from_checkpoint", "me/run", "--output_dir", str(tmp_path / "here"), "--max_steps", "8", "--dataset",
        f"{shards}/*.jsonl.zst", **hub.environment(), HF_HOME=str(tmp_path / "hf"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert set(hub.models) == {"me/run"} and len(repo.commits) == 3, "the first, the run's, the evil one"
    assert "not taken" in done.stderr and not (tmp_path / "here" / "tensorboard").exists()


@pytest.mark.first(2)
@pytest.mark.parametrize("way", ["absolute", "upwards", "link", "link to a folder"])
def test_an_outbox_of_somebody_else_holds_files_of_a_checkpoint_or_nothing(evil, secret, hub, way):
    entry = evil / "_outbox" / "step-40"
    shutil.copytree(evil / "checkpoint-40", entry)
    name = {"absolute": str(secret), "upwards": "../../../home/secret.jsonl", "link": "secret.jsonl"}.get(
        way, "x/secret.jsonl"
    )
    if way == "link":
        (entry / name).symlink_to(secret)
    elif way == "link to a folder":
        (entry / "x").symlink_to(secret.parent)
    data = secret.read_bytes()
    entry_of = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit(entry / "manifest.json", lambda manifest: manifest["files"].update({name: entry_of}))
    unnamed = run_command("push", str(evil), **hub.environment())
    assert unnamed.returncode == 1 and "--hub_model_id" in unnamed.stderr and not hub.models
    done = run_command("push", str(evil), "--hub_model_id", "me/mine", "--hub_patience", "1", **hub.environment())
    assert "Traceback" not in done.stderr
    assert SECRET[:30].encode() not in left_the_machine(hub), done.stderr


@pytest.mark.first(4)
@pytest.mark.parametrize(
    "name", ["_lock", "ledger.jsonl", "surprisals.f32", "samples.jsonl", "run.json", "training_viz"]
)
@pytest.mark.parametrize("way", ["start", "resume"])
def test_a_link_in_a_run_folder_is_named_and_what_it_leads_to_is_left_alone(evil, secret, shards, name, way):
    before = secret.read_bytes()
    run = evil if way == "resume" else evil.parent / "new"
    run.mkdir(exist_ok=True)
    path = run / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(secret if name != "training_viz" else secret.parent)
    flags = [*NANO, "--dataset", f"{shards}/*.jsonl.zst", "--output_dir", str(run), "--max_steps", "44"]
    done = run_script(
        *(flags if way == "start" else flags[len(NANO) :]),
        *(["--resume_from_checkpoint", "true"] if way == "resume" else []),
    )
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert str(path) in done.stderr or name == "run.json", done.stderr
    assert secret.read_bytes() == before and list(secret.parent.iterdir()) == [secret]


@pytest.mark.first(3)
@pytest.mark.parametrize("overwrite", [[], ["--overwrite_output_dir"]])
@pytest.mark.parametrize(
    "name", ["checkpoint-500/weights", "tensorboard/events", "samples.jsonl", "ledger.jsonl", "run.json"]
)
def test_files_that_no_run_of_ours_made_are_neither_deleted_nor_added_to(tmp_path, shards, overwrite, name):
    path = tmp_path / "theirs" / name
    path.parent.mkdir(parents=True)
    path.write_text("{}\n")
    flags = [*NANO, "--dataset", f"{shards}/*.jsonl.zst", "--output_dir", str(tmp_path / "theirs"), "--max_steps", "2"]
    done = run_script(*flags, *overwrite)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "holds" in done.stderr and str(tmp_path / "theirs") in done.stderr
    assert path.read_text() == "{}\n"


@pytest.mark.long
def test_what_is_shown_steers_no_terminal(finished, tmp_path):
    """OSC 52 writes the clipboard, and a carriage return hides what stands before it."""
    corpus, evil = tmp_path / "corpus.jsonl", "\x1b]52;c;ZXZpbA==\x07\rgood"
    lines = [{"text": f"some words number {n}", "meta": {"redpajama_set_name": evil}} for n in range(20)]
    corpus.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = run_command("evaluate", str(finished), "--dataset", str(corpus), "--documents", "5")
    assert done.returncode == 0, done.stderr
    assert "ZXZpbA" in done.stdout
    for text in (done.stdout, done.stderr):
        assert "\x1b]" not in text and "\x07" not in text and "\r" not in text.replace("\r\n", "\n")
    config = tmp_path / "config.yaml"
    config.write_text('"learning\\e]52;c;ZXZpbA==\\a": 3\n')
    refused = run_script("--config", str(config))
    assert refused.returncode != 0 and "\x1b" not in refused.stderr and "ZXZpbA" in refused.stderr


def test_a_token_that_does_not_look_like_one_is_blanked_too(finished, tmp_path, hub):
    token = "glpat:my-very-own-token"
    run = tmp_path / "run"
    flags = [*NANO, "--dataset", "embedded", "--max_steps", "2", "--output_dir", str(run), "--hub_token", token]
    done = run_script(*flags, "--run_name", token)
    assert token not in done.stdout + done.stderr
    for path in run.rglob("*"):
        assert not path.is_file() or token.encode() not in path.read_bytes(), path


def _take_and_count(folder: str, times: int) -> None:
    from slimpajama_hf.errors import UserError
    from slimpajama_hf.record.lock import FolderLock

    counter, done = Path(folder) / "counter", 0
    while done < times:
        lock = FolderLock(Path(folder))
        try:
            lock.take()
        except UserError:
            continue
        value = int(counter.read_text())
        os.sched_yield()
        counter.write_text(str(value + 1))
        lock.release()
        done += 1


def test_a_lock_is_never_held_by_two(tmp_path):
    (tmp_path / "counter").write_text("0")
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_take_and_count, args=(str(tmp_path), 150)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert (tmp_path / "counter").read_text() == "450"


class _Payload:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/slimpajama_hf-was-here",)


@pytest.mark.first(2)
@pytest.mark.parametrize("damage", ["pickle", "types", "name", "cursor"])
@pytest.mark.long
def test_a_checkpoint_that_is_none_is_set_aside_and_the_one_before_is_used(finished, tmp_path, damage):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    folder = run / "checkpoint-40"
    if damage == "pickle":
        (folder / "optimizer.pt").write_bytes(pickle.dumps(_Payload()))
    elif damage == "cursor":
        (folder / "data_state.json").write_text('{"cursor": {"shard": 3, "row": "x"}}')
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        path = folder / name
        manifest["files"][name] = checkpoints.sum_of(path)
    if damage == "types":
        manifest["files"]["config.json"] = 7
    (folder / "manifest.json").write_text(json.dumps(manifest))
    if damage == "name":
        shutil.copytree(folder, run / "checkpoint-0041")
        shutil.rmtree(folder)
    done = run_script("--output_dir", str(run), "--resume_from_checkpoint", "true", "--max_steps", "41")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "resumed  " in done.stderr and "at step 30" in done.stderr
    assert damage == "name" or "set aside as _bad-checkpoint-40" in done.stderr
    assert not Path("/tmp/slimpajama_hf-was-here").exists()
    assert read_ledger(run)[:40] and [row["step"] for row in read_ledger(run)] == list(range(41))


@pytest.mark.first(2)
@pytest.mark.parametrize("name", ["samples.jsonl", "passports.jsonl", "prompts.jsonl"])
@pytest.mark.parametrize("damage", ["flip", "zeros", "types"])
def test_a_damaged_line_is_left_out_and_said_and_the_run_goes_on(finished, tmp_path, name, damage):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    content = bytearray((run / name).read_bytes())
    if damage == "flip":
        content[0] ^= 1
    elif damage == "zeros":
        content[20:532] = bytes(512)
    else:
        content[:0] = b"[1, 2]\n"
    (run / name).write_bytes(content)
    done = run_script("--output_dir", str(run), "--resume_from_checkpoint", "true", "--max_steps", "41")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert f"{name}: " in done.stderr and "cannot be read and are left out" in done.stderr
    for line in (run / name).read_text().splitlines():
        json.loads(line)


@pytest.mark.first(1)
@pytest.mark.parametrize("damage", ["value", "row gone", "types", "chain"])
@pytest.mark.long
def test_a_damaged_ledger_is_no_ledger_to_go_on_with(finished, tmp_path, damage):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    lines = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    if damage == "value":
        lines[25] = lines[25].replace(b'"tokens":', b'"tokens":1', 1)
    elif damage == "row gone":
        del lines[25]
    elif damage == "types":
        lines[25] = b'{"step": 25, "loss": "x"}\n'
    else:
        lines[25] = lines[25][:-10] + b"0" * 7 + lines[25][-3:]
    (run / "ledger.jsonl").write_bytes(b"".join(lines))
    done = run_script("--output_dir", str(run), "--resume_from_checkpoint", "true", "--max_steps", "41")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "step 25: " in done.stderr and f"--resume_from_checkpoint {run}/checkpoint-20" in done.stderr, done.stderr
    done = run_script("--resume_from_checkpoint", f"{run}/checkpoint-20", "--max_steps", "40")
    assert done.returncode == 0, done.stderr
    weights = [(folder / "checkpoint-40/model.safetensors").read_bytes() for folder in (run, finished)]
    assert weights[0] == weights[1], "and what was damaged is learned again, to the bit"


@pytest.mark.slow
def test_surprisals_that_are_not_of_their_loss_are_said_and_unknown_from_then_on(finished, tmp_path):
    import numpy as np

    run = Path(shutil.copytree(finished, tmp_path / "run"))
    content = bytearray((run / "surprisals.f32").read_bytes())
    content[800:1312] = bytes(512)
    (run / "surprisals.f32").write_bytes(content)
    done = run_script("--output_dir", str(run), "--resume_from_checkpoint", "true", "--max_steps", "41")
    assert done.returncode == 0 and "do not have their loss as their mean" in done.stderr, done.stderr
    values = np.frombuffer((run / "surprisals.f32").read_bytes(), "<f4")
    assert np.isnan(values[200:328]).all()
    assert run_command("verify", str(run)).returncode == 0


@pytest.mark.parametrize(
    "text", ["[" * 20_000, "a: " + "1" * 40_000, "a: [&a [*a]]", "? [1]\n: 2", "\0", "2001-99-99: 3"]
)
def test_a_configuration_that_is_none_is_one_sentence(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    done = run_script("--config", str(tmp_path / "c.yaml"))
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr and "c.yaml" in done.stderr


@pytest.mark.first(6)
@pytest.mark.parametrize(
    "text", ["[]", '{"run_id": NaN}', "{", "[" * 20_000, '{"corpus": 3, "model": [], "sessions": "x"}']
)
@pytest.mark.parametrize("command", ["report", "verify", "inspect", "views", "resume"])
def test_a_record_that_is_none_is_no_traceback(finished, tmp_path, text, command):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "run.json").write_text(text)
    if command == "resume":
        done = run_script("--output_dir", str(run), "--resume_from_checkpoint", "true", "--max_steps", "41")
    else:
        done = run_command(command, str(run), *(["--step", "3"] if command == "inspect" else []))
    assert "Traceback" not in done.stderr, done.stderr
    assert command == "report" or done.returncode != 0
