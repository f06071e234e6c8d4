"""Checkpoints to the Hub: real runs, a real HTTP server in the Hub's place, and everything that goes wrong with one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slimpajama_hf.record import columns, ledger
from tests.conftest import NANO, environment, make_records, read_ledger, run_command, run_script, write_records
from tests.hub.loopback_model_hub import TOKEN, Account, LoopbackModelHub, Push


@pytest.fixture
def hub() -> Iterator[LoopbackModelHub]:
    with LoopbackModelHub() as server:
        yield server


def slow(*case: Any) -> Any:
    """A case of the long version (`make test-faults`)."""
    return pytest.param(*case, marks=pytest.mark.slow)


def flags(shards: Path, run: Path, steps: int = 20, save: int = 10) -> list[str]:
    return [*NANO, "--dataset", f"{shards}/*.jsonl.zst", "--max_steps", str(steps), "--save_steps", str(save),
            "--output_dir", str(run), "--push_to_hub", "--hub_model_id", "me/run", "--hub_patience", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def pushed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LoopbackModelHub, Path, str]]:
    """A run of 20 steps, pushed as it went: the server, its folder, what it said."""
    folder = tmp_path_factory.mktemp("pushed")
    held_out = write_records(folder / "secret-folder" / "held-out.jsonl", make_records(4, seed=9))
    with LoopbackModelHub() as server:
        done = run_script(
            *flags(shards, folder / "run"), "--eval_steps", "10", "--eval_dataset", str(held_out), "--display_samples", "5",
            "--hub_license", "apache-2.0", **server.environment(),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        yield server, folder / "run", done.stderr


def download(server: LoopbackModelHub, folder: Path, under: str = "") -> Path:
    """The files of `me/run` as they are on the server."""
    for name, data in server.models["me/run"].files.items():
        if name.startswith(under):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return folder


def test_what_goes_up_is_a_model_and_its_run(pushed):
    server, run, said = pushed
    names = set(server.models["me/run"].files)
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json",
            "README.md", "report.html", "ledger.jsonl", "run.json", "run_config.yaml", "samples.jsonl",
            "training_viz/training_latest.png", "training_viz/metrics_history.json", "training_viz/text_samples.json",
            "checkpoint/optimizer.pt", "checkpoint/data_state.json", "checkpoint/manifest.json"} <= names  # fmt: skip
    assert not [
        name for name in names if name.startswith("_") or "training_step_" in name or name == "training_args.bin"
    ]
    titles = server.models["me/run"].titles
    assert titles[-1] == "Step 20" and set(titles) <= {"Step 10", "Step 20"}
    assert (
        server.models["me/run"].files["model.safetensors"] == (run / "checkpoint-20" / "model.safetensors").read_bytes()
    )
    assert server.models["me/run"].files["ledger.jsonl"] == (run / "ledger.jsonl").read_bytes()
    assert f"hub  {server.url}/me/run, step 20" in said


def test_nothing_of_this_machine_and_no_token_goes_up(pushed, shards):
    server, run, _ = pushed
    words = [TOKEN, str(run.parent), str(shards.parent), str(Path.home()), "secret-folder"]
    for name, data in server.models["me/run"].files.items():
        for word in words:
            assert word.encode() not in data, f"{word} stands in {name}"


def test_the_card_is_of_this_run(pushed):
    server, run, _ = pushed
    from huggingface_hub import ModelCard

    text = server.models["me/run"].files["README.md"].decode()
    data = ModelCard(text).data.to_dict()
    rows = read_ledger(run)
    assert (data["library_name"], data["pipeline_tag"], data["license"]) == (
        "transformers",
        "text-generation",
        "apache-2.0",
    )
    evaluation = json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])["scores"]["all"]
    values = [metric["value"] for result in data["model-index"][0]["results"] for metric in result["metrics"]]
    assert any(value == pytest.approx(evaluation["loss"], abs=1e-4) for value in values)
    # Files here: the loader that reads them stands where a dataset on the Hub would.
    assert {result["dataset"]["type"] for result in data["model-index"][0]["results"]} == {"json"}
    bits = columns.read_columns(run / "ledger.jsonl").prequential_bits_per_byte()
    assert any(value == pytest.approx(bits, abs=1e-4) for value in values)
    assert rows[-1]["chain"] in text and "training_viz/training_latest.png" in text
    assert text.count("```") >= 4 and "pipeline(" in text and "run_clm_slimpajama.py" in text


@pytest.mark.long
def test_it_loads_as_any_model_does(pushed, tmp_path):
    server, _, _ = pushed
    code = (
        "from transformers import pipeline, AutoTokenizer; import json;"
        "p = pipeline('text-generation', model='me/run'); t = AutoTokenizer.from_pretrained('me/run');"
        "print(json.dumps([t('The river and the city.').input_ids, p('The river', max_new_tokens=5)[0]['generated_text']]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
        env=environment(**server.environment(None), HF_HOME=str(tmp_path / "hf")),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ids, text = json.loads(done.stdout.splitlines()[-1])
    from slimpajama_hf.samples.encoder import Encoder
    from slimpajama_hf.samples.tokenizer import load_tokenizer

    assert ids == Encoder(load_tokenizer("builtin")).encode("The river and the city.")[0]
    assert text.startswith("The river")


@pytest.mark.slow
def test_a_branch_holds_the_run_and_main_stays_as_it_is(hub, shards, tmp_path):
    run = tmp_path / "run"
    done = run_script(*flags(shards, run, 10, 5), "--hub_revision", "trial", **hub.environment())
    assert done.returncode == 0, done.stderr
    repo = hub.models["me/run"]
    branch = repo.trees[repo.heads["trial"]]
    assert branch["model.safetensors"] == (run / "checkpoint-10/model.safetensors").read_bytes()
    assert repo.titles == [] and "model.safetensors" not in repo.files
    elsewhere = tmp_path / "elsewhere"
    done = run_script(
        "--resume_from_checkpoint", "me/run@trial", "--output_dir", str(elsewhere), "--max_steps", "12", "--no-checkpoint",
        "--dataset", f"{shards}/*.jsonl.zst", "--push_to_hub", "false", "--allow_changes", "dataset",
        **hub.environment(), HF_HOME=str(tmp_path / "hf"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(read_ledger(elsewhere)) == 12


# ---- what a user can get wrong ----


@pytest.mark.first(1)
@pytest.mark.parametrize(
    "account, token, said",
    [(Account(), None, "there is no Hub token on this machine"),
     (Account(role="read"), TOKEN, "the Hub token of me may only read; expected write"),
     slow(Account(name="you"), TOKEN, "--hub_model_id me/run: the Hub token is of you, who is not in me"),
     slow(Account(role="fineGrained", scoped=[]), TOKEN, "the fine-grained Hub token of me may not write to me/run"),
     slow(None, TOKEN, "the Hub refuses the token (HTTP 401)")],
)  # fmt: skip
def test_a_token_that_may_not_is_said_before_anything_is_opened(hub, shards, tmp_path, account, token, said):
    hub.accounts = {} if account is None else {TOKEN: account}
    done = run_script(*flags(shards, tmp_path / "run"), **hub.environment(token), HF_HOME=str(tmp_path / "hf"))
    assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists() and not hub.models


# ---- what the Hub can get wrong ----


@pytest.mark.first(1)
@pytest.mark.parametrize(
    "fault, said",
    [slow(Push("/commit/", status=503), "HTTP 503"), slow(Push("/commit/", status=403), "HTTP 403"),
     slow(Push("POST /api/repos/create", status=401), "HTTP 401"), slow(Push("/commit/", status=429), "HTTP 429"),
     slow(Push("PUT /_lfs/", how="reset", after=4096), "")],
)  # fmt: skip
def test_a_hub_that_fails_stops_nothing_and_push_finishes_later(hub, shards, tmp_path, fault, said):
    hub.pushes = [fault]
    run = tmp_path / "run"
    done = run_script(*flags(shards, run), **hub.environment())
    assert done.returncode == 0, done.stderr
    assert len(read_ledger(run)) == 20
    assert f"not pushed  step 20 to me/run: {said}" in done.stderr
    assert f"finish it  python -m slimpajama_hf push {run}" in done.stderr and "Traceback" not in done.stderr
    assert not hub.models.get("me/run") or hub.models["me/run"].titles == []
    hub.pushes = []
    again = run_command("push", str(run), **hub.environment())
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith(f"{hub.url}/me/run, step 20")
    assert hub.models["me/run"].titles == ["Step 20"]
    third = run_command("push", str(run), **hub.environment())
    assert third.returncode == 0 and "has step 20 already" in third.stdout


@pytest.mark.slow
def test_no_hub_at_all(shards, tmp_path):
    run = tmp_path / "run"
    offline = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": TOKEN}
    done = run_script(*flags(shards, run), **offline)
    assert done.returncode == 0, done.stderr
    assert "the Hub does not answer" in done.stderr and "finish it" in done.stderr
    failed = run_command("push", str(run), "--hub_patience", "1", **offline)
    assert failed.returncode == 1 and "Traceback" not in failed.stderr and "it waits in" in failed.stderr


@pytest.mark.slow
def test_a_failure_that_passes_is_tried_again(hub, shards, tmp_path):
    hub.pushes = [Push("/commit/", status=503, times=1), Push("PUT /_lfs/", how="reset", after=1000, times=1)]
    done = run_script(*flags(shards, tmp_path / "run"), "--hub_patience", "60", **hub.environment())
    assert done.returncode == 0, done.stderr
    assert hub.models["me/run"].titles[-1] == "Step 20" and "finish it" not in done.stderr


@pytest.mark.slow
def test_a_hub_that_never_answers_delays_no_step(hub, shards, tmp_path):
    hub.pushes = [Push("/preupload/", how="stall")]
    run = tmp_path / "run"
    done = run_script(*flags(shards, run, steps=60, save=10), "--hub_patience", "0", **hub.environment())
    assert done.returncode == 0, done.stderr
    # Six checkpoints were laid into the outbox, and the newest is what waits beside the one that is held up.
    waiting = sorted(path.name for path in (run / "_outbox").iterdir() if re.match(r"step-|uploading-", path.name))
    assert 1 <= len(waiting) <= 2 and waiting[0] != "step-10"
    assert "finish it" in done.stderr


@pytest.mark.slow
def test_a_killed_run_pushes_what_waits_when_it_goes_on(hub, shards, tmp_path):
    hub.pushes = [Push("/commit/", status=503)]
    run = tmp_path / "run"
    assert run_script(*flags(shards, run), **hub.environment()).returncode == 0
    hub.pushes = []
    done = run_script(*flags(shards, run, steps=25), "--resume_from_checkpoint", "true", **hub.environment())
    assert done.returncode == 0, done.stderr
    assert hub.models["me/run"].titles[-1] == "Step 25"
    assert not [path for path in (run / "_outbox").iterdir() if re.match(r"step-|uploading-", path.name)]


@pytest.mark.slow
def test_a_private_repository_and_no_state(hub, shards, tmp_path):
    done = run_script(
        *flags(shards, tmp_path / "run"), "--hub_private_repo", "true", "--hub_strategy", "end", **hub.environment()
    )
    assert done.returncode == 0, done.stderr
    repo = hub.models["me/run"]
    assert repo.private and repo.titles == ["Step 20"]
    assert not [name for name in repo.files if name.startswith("checkpoint/")]


# ---- going on from the Hub ----


def same(one: Path, other: Path) -> None:
    """Two runs, bit for bit but for times."""
    left, right = read_ledger(one), read_ledger(other)
    assert [{k: v for k, v in row.items() if k not in ledger.TIME_FIELDS} for row in left] == [
        {k: v for k, v in row.items() if k not in ledger.TIME_FIELDS} for row in right
    ]
    last = f"checkpoint-{len(left)}/model.safetensors"
    assert (one / last).read_bytes() == (other / last).read_bytes()
    assert (one / "surprisals.f32").read_bytes() == (other / "surprisals.f32").read_bytes()


@pytest.mark.parametrize("revision", [pytest.param("", marks=pytest.mark.slow), "@commit"])
@pytest.mark.long
def test_a_run_goes_on_from_the_hub_in_another_folder_bit_for_bit(pushed, shards, tmp_path, revision):
    server, run, _ = pushed
    commit = server.models["me/run"].commits[-1][0]
    where = f"me/run{revision.replace('commit', commit)}"
    data = ["--dataset", f"{shards}/*.jsonl.zst"]
    never = tmp_path / "never-stopped"
    assert (
        run_script(*NANO, *data, "--max_steps", "30", "--save_steps", "10", "--output_dir", str(never)).returncode == 0
    )
    elsewhere = tmp_path / "elsewhere"
    held_out = run.parent / "secret-folder" / "held-out.jsonl"
    done = run_script(
        "--resume_from_checkpoint", where, "--max_steps", "30", "--output_dir", str(elsewhere), *data,
        "--eval_dataset", str(held_out), "--push_to_hub", "false",
        **server.environment(), HF_HOME=str(tmp_path / "hf"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    same(elsewhere, never)


@pytest.mark.first(1)
@pytest.mark.parametrize("where, said", [("me/nothing", "me/nothing"), ("me/run@0123456789abcdef", "0123456789abcdef")])
def test_a_repository_that_is_not_there_is_one_sentence(pushed, tmp_path, where, said):
    server, _, _ = pushed
    done = run_script("--resume_from_checkpoint", where, "--output_dir", str(tmp_path / "run"), **server.environment())
    assert done.returncode in (1, 2) and said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "ledger.jsonl").exists()
