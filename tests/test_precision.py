"""What is asked for is what is computed: every cell of the table in docs/precision.md."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slimpajama_hf import precision
from slimpajama_hf.errors import UsageError
from slimpajama_hf.model import products
from tests.conftest import ROOT, environment, run_script

#: Two steps, a sample and a passport at step 0, held-out scores after the second.
SHORT = [
    "--max_steps", "2", "--display_samples", "1", "--viz_interval", "0", "--max_seq_length", "32",
    "--no-checkpoint", "--eval_steps", "2", "--eval_documents", "2", "--tokenizer", "builtin",
]  # fmt: skip
GPT2 = ["--model", "tiny", "--config_overrides", "n_layer=1,n_embd=32,n_head=2,n_positions=64"]
LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
ASKED = ("auto", "float32", "bfloat16", "float16")


@pytest.fixture
def fast() -> str:
    """What `auto` is on this processor."""
    return precision.choose("auto", torch.device("cpu"))


@pytest.fixture
def llama(tmp_path: Path) -> list[str]:
    path = tmp_path / "llama.json"
    path.write_text(json.dumps(LLAMA))
    return ["--model", str(path)]


def seen(launcher: list[str], groups: list[list[str]], **variables: str) -> tuple[list[dict], str]:
    """What each run of `groups` was seen to compute in, and what was said."""
    words = [word for group in groups for word in ("--", *group)][1:]
    done = subprocess.run(
        [*launcher, "-m", "tests.seen_precision", *words],
        capture_output=True, text=True, timeout=280, env=environment(**variables), cwd=ROOT,
    )  # fmt: skip
    lines = [json.loads(line.split("SEEN ")[1]) for line in done.stdout.splitlines() if "SEEN " in line]
    return lines, done.stderr


def flags(model: list[str], shards: Path, run: Path, asked: str) -> list[str]:
    files = [str(path) for path in sorted(shards.glob("*.zst"))]
    return [*model, *SHORT, "--dataset", files[0], "--eval_dataset", files[1], "--output_dir", str(run / asked),
            "--precision", asked]  # fmt: skip


@pytest.mark.first(1)
@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("written out", []),
        ("autograd", ["--backward", "autograd"]),
        ("accumulated", ["--gradient_accumulation_steps", "2"]),
        ("llama", []),
    ],
)
@pytest.mark.long
def test_one_process_computes_in_what_was_asked_for(path, more, shards, tmp_path, llama, fast):
    model = llama if path == "llama" else GPT2
    runs = [[*flags(model, shards, tmp_path, asked), *more] for asked in ASKED]
    found, said = seen([sys.executable], runs)
    assert len(found) == len(ASKED), said
    for asked, what in zip(ASKED, found, strict=True):
        wanted = fast if asked == "auto" else asked
        assert what["exit"] == 0, said
        # The loss is computed in float32, its products are not.
        assert what["step"] == [wanted], asked
        # What is shown and scored is computed in float32, whatever training does.
        assert what["shown"] in ([], ["float32"]), asked
        record = json.loads((tmp_path / asked / "run.json").read_text())
        assert record["model"]["computed_in"] == wanted
        # Accumulated documents are left to autograd.
        by = (
            products.library(torch.device("cpu"), getattr(torch, wanted))
            if path == "written out"
            else "autograd's operators"
        )
        assert record["model"]["products_by"] == by
        assert f"computes  in {wanted}, seen in the layers of the model; products by {by}" in said


def _launch(shards: Path, tmp_path: Path, asked: str, fsdp: bool, **variables: str) -> tuple[list[dict], str]:
    if fsdp:
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
                    str(ROOT / "configs/accelerate/fsdp2.yaml"), "--num_processes", "2"]  # fmt: skip
    else:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return seen(launcher, [flags(GPT2, shards, tmp_path, asked)], **variables)


def _check_two(shards: Path, tmp_path: Path, asked: str, fsdp: bool, wanted: str, **variables: str) -> None:
    found, said = _launch(shards, tmp_path, asked, fsdp, **variables)
    assert [(what["exit"], what["step"]) for what in found] == [(0, [wanted])] * 2, said
    if not fsdp:
        # A sharded model is scored by all processes, as it trains.
        assert {name for what in found for name in what["shown"]} == {"float32"}
    record = json.loads((tmp_path / asked / "run.json").read_text())
    assert record["model"]["computed_in"] == wanted


@pytest.mark.first(1)
@pytest.mark.parametrize("fsdp", [False, True], ids=["DDP", "FSDP2"])
@pytest.mark.long
def test_two_processes_compute_in_bfloat16(fsdp, shards, tmp_path):
    _check_two(shards, tmp_path, "bfloat16", fsdp, "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["auto", "float32", "float16"])
@pytest.mark.parametrize("fsdp", [False, True], ids=["DDP", "FSDP2"])
def test_two_processes_compute_in_what_was_asked_for(fsdp, asked, shards, tmp_path, fast):
    _check_two(shards, tmp_path, asked, fsdp, fast if asked == "auto" else asked)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["DDP", "FSDP2"])
def test_two_processes_obey_their_launcher(fsdp, shards, tmp_path):
    if fsdp:
        pytest.skip("accelerate launch overwrites the variable with that of its configuration file")
    _check_two(shards, tmp_path, "auto", fsdp, "bfloat16", ACCELERATE_MIXED_PRECISION="bf16")


@pytest.mark.first(1)
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_the_launchers_precision_is_obeyed_where_no_flag_says_otherwise(model, shards, tmp_path, llama):
    run = flags(llama if model == "llama" else GPT2, shards, tmp_path, "auto")
    found, said = seen([sys.executable], [run], ACCELERATE_MIXED_PRECISION="bf16")
    assert found[0]["step"] == ["bfloat16"], said
    assert 'precision: "bfloat16"' in (tmp_path / "auto" / "run_config.yaml").read_text()


NO: dict[str, bool] = {}


@pytest.mark.parametrize(
    ("flag", "flags", "launcher", "found"),
    [
        ("auto", NO, "no", "auto"),
        ("auto", NO, "bf16", "bfloat16"),
        ("auto", NO, "fp16", "float16"),
        ("float32", NO, "no", "float32"),
        ("bfloat16", NO, "bf16", "bfloat16"),
        ("auto", {"bf16": True}, "no", "bfloat16"),
        ("bfloat16", {"bf16": True}, "bf16", "bfloat16"),
        ("auto", {"fp16": True}, "fp16", "float16"),
        ("auto", {"bf16": False}, "no", "float32"),
        ("float16", {"bf16": False}, "no", "float16"),
        ("auto", {"bf16": False, "fp16": True}, "no", "float16"),
    ],
)
def test_wishes_that_agree(flag, flags, launcher, found):
    assert precision.asked(flag, flags, {precision.LAUNCHER: launcher}) == found


@pytest.mark.parametrize(
    ("flag", "flags", "launcher", "said"),
    [
        ("float32", NO, "bf16", "--precision float32 and the launcher's mixed_precision bf16 contradict"),
        ("float32", {"bf16": True}, "no", "--precision float32 and --bf16 true contradict"),
        ("bfloat16", {"fp16": True}, "no", "--precision bfloat16 and --fp16 true contradict"),
        ("auto", {"bf16": True, "fp16": True}, "no", "--bf16 true and --fp16 true contradict"),
        ("bfloat16", {"bf16": False}, "no", "--bf16 false and --precision bfloat16 contradict"),
        ("auto", {"bf16": False}, "bf16", "--bf16 false and the launcher's mixed_precision bf16 contradict"),
        ("auto", NO, "fp8", "the launcher asks for the precision fp8"),
    ],
)
def test_wishes_that_contradict_each_other_are_refused(flag, flags, launcher, said):
    with pytest.raises(UsageError, match=said):
        precision.asked(flag, flags, {precision.LAUNCHER: launcher})


@pytest.mark.first(1)
@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", "contradict each other"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "the launcher asks for DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "true", "started one process"),
    ],
)
def test_the_command_line_refuses_what_a_launcher_says_otherwise(variable, value, said, tmp_path):
    done = run_script("--precision", "float32", "--output_dir", str(tmp_path / "run"), **{variable: value})
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("major", "minor", "name", "fast"),
    [
        (7, 5, "Tesla T4", True),
        (7, 5, "NVIDIA GeForce RTX 2060", True),
        (7, 5, "NVIDIA GeForce GTX 1660 Ti", False),
        (7, 0, "Tesla V100-SXM2-16GB", True),
        (6, 1, "NVIDIA GeForce GTX 1080", False),
    ],
)
def test_cards_with_fast_float16(major, minor, name, fast):
    class Card:
        pass

    card = Card()
    card.major, card.minor, card.name = major, minor, name
    assert precision.has_fast_float16(card) is fast
