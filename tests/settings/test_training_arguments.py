"""Every field of TrainingArguments has its effect or is refused in a sentence."""

from __future__ import annotations

import dataclasses

import pytest
from transformers import TrainingArguments

from slimpajama_hf.errors import UsageError
from slimpajama_hf.session import command_line
from slimpajama_hf.settings.arguments import TRAINING_DEFAULTS
from slimpajama_hf.settings.training_arguments import PASSED_ON, REFUSED
from slimpajama_hf.settings.what_matters import ALSO_DECIDES, WHAT_MATTERS
from tests.conftest import NANO_UNSEEN, read_ledger, run_script


def test_every_field_of_this_version_has_been_decided_on():
    ours, refused = set(TRAINING_DEFAULTS), set(REFUSED)
    there = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    undecided = there - ours - PASSED_ON - refused
    assert not undecided, "a new field of transformers: PASSED_ON or REFUSED in training_arguments.py?"
    assert not PASSED_ON & (ours | refused)


def test_of_every_flag_it_is_decided_whether_a_strangers_run_may_say_it():
    """What is passed on either decides numbers, or reaches devices, the outside, or this start alone."""
    not_its_word = {
        # `--precision` is taken.
        "bf16", "fp16",
        "use_cpu", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
        "eval_strategy", "eval_delay", "eval_on_start", "save_only_model", "hub_token", "hub_revision",
        "auto_find_batch_size", "do_train", "ddp_find_unused_parameters", "ddp_broadcast_buffers", "ddp_backend",
        "ddp_timeout", "local_rank",
    }  # fmt: skip
    taken = set(WHAT_MATTERS) | set(ALSO_DECIDES)
    assert not taken & not_its_word and taken | not_its_word >= PASSED_ON


#: A value other than the default, as it is typed.
ODD = {
    "logging_strategy": "epoch", "log_level": "debug", "log_level_replica": "debug", "debug": "underflow_overflow",
    "include_num_input_tokens_seen": "true", "include_for_metrics": "loss", "lr_scheduler_kwargs": '{"a": 1}',
    "accelerator_config": '{"split_batches": true}',
    "fsdp": "full_shard", "fsdp_config": '{"fsdp_version": 2}', "deepspeed": "x.json", "label_names": "labels",
    "train_sampling_strategy": "sequential", "length_column_name": "n", "metric_for_best_model": "loss",
    "dataloader_multiprocessing_context": "spawn", "greater_is_better": "true", "num_train_epochs": "5",
}  # fmt: skip


# `--parallelism_config` is no flag that can be typed.
@pytest.mark.parametrize("name", sorted(REFUSED.keys() - {"parallelism_config"}))
def test_a_field_without_effect_is_refused_and_says_what_to_use(name):
    fields = {field.name: field for field in dataclasses.fields(command_line.parse([]).training)}
    if name not in fields:
        pytest.skip("not a field of this version of transformers")
    default = fields[name].default
    value = ODD.get(name) or (str(not default).lower() if isinstance(default, bool) else "3")
    with pytest.raises(UsageError, match=f"--{name} .*: it would have no effect here: "):
        command_line.parse([f"--{name}", value])


@pytest.mark.parametrize("flags", [["--num_train_epochs", "3"], ["--logging_steps", "500"]])
def test_a_number_without_effect_is_refused_though_it_is_the_default(flags):
    with pytest.raises(UsageError, match="it would have no effect here"):
        command_line.parse(flags)


def test_a_default_that_is_typed_is_no_offence():
    command_line.parse(["--logging_strategy", "no", "--dataloader_num_workers", "0", "--label_smoothing_factor", "0"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--eval_strategy", "epoch"], "--eval_steps N"),
        (["--eval_steps", "5", "--save_strategy", "best"], "every --save_steps N"),
        (["--eval_on_start", "true"], "--eval_steps N"),
        (["--optim_args", "a=1"], "takes no --optim_args"),
    ],
)
def test_flags_that_need_another_say_so(flags, said):
    with pytest.raises(UsageError, match=said):
        command_line.parse(flags)


def test_a_share_of_warm_up_is_a_number_from_the_start():
    settings = command_line.parse(["--warmup_steps", "0.5", "--max_steps", "200"])
    assert "warmup_steps: 100\n" in settings.to_yaml()


@pytest.mark.slow
def test_more_steps_do_not_warm_up_again(tmp_path, shards):
    run = tmp_path / "run"
    flags = [*NANO_UNSEEN, "--dataset", f"{shards}/*.jsonl.zst", "--output_dir", str(run), "--precision", "float32"]
    assert run_script(*flags, "--max_steps", "8", "--warmup_steps", "0.5").returncode == 0
    more = run_script("--output_dir", str(run), "--resume_from_checkpoint", "true", "--max_steps", "16")
    assert more.returncode == 0, more.stderr
    rates = [row["learning_rate"] for row in read_ledger(run)]
    assert rates == [0.00025, 0.0005, 0.00075] + [0.001] * 13


@pytest.mark.slow
def test_a_run_of_an_older_version_goes_on_and_what_is_not_taken_is_said(tmp_path, shards):
    """It has no mark that says whose it is: only what decides its numbers counts, and its corpus is named again."""
    run = tmp_path / "run"
    flags = [*NANO_UNSEEN, "--dataset", f"{shards}/*.jsonl.zst", "--output_dir", str(run), "--precision", "float32"]
    assert run_script(*flags, "--max_steps", "4").returncode == 0
    config = run / "run_config.yaml"
    config.write_text(config.read_text() + "logging_steps: 10\nnum_train_epochs: 5\n")
    on = ["--output_dir", str(run), "--resume_from_checkpoint", "true", "--max_steps", "6"]
    refused = run_script(*on)
    assert refused.returncode == 1 and "name them on this machine with --dataset" in refused.stderr
    more = run_script(*on, "--dataset", f"{shards}/*.jsonl.zst")
    assert more.returncode == 0, more.stderr
    left = more.stderr.partition("not taken  ")[2].partition(";")[0].split(", ")
    assert {"logging_steps", "num_train_epochs", "save_steps"} <= set(left)
    assert run_script(*on[:-1], "7").returncode == 0, "it is this user's from here on"
    assert len(read_ledger(run)) == 7


@pytest.mark.long
def test_a_checkpoint_of_the_model_alone_is_refused_by_name(tmp_path, shards):
    run = tmp_path / "run"
    flags = [*NANO_UNSEEN, "--dataset", f"{shards}/*.jsonl.zst", "--output_dir", str(run), "--precision", "float32"]
    begun = run_script(*flags, "--max_steps", "4", "--save_only_model", "true")
    assert begun.returncode == 0, begun.stderr
    assert "saves  the model alone" in begun.stderr
    for asked in ("true", str(run / "checkpoint-4")):
        more = run_script("--output_dir", str(run), "--resume_from_checkpoint", asked, "--max_steps", "6")
        assert more.returncode == 1
        assert f"error: {run}/checkpoint-4: it lacks the optimizer's state and scheduler.pt" in more.stderr
        assert (run / "checkpoint-4").is_dir()
    assert len(read_ledger(run)) == 4


def test_the_ledger_has_the_rate_of_the_optimizer(tmp_path, shards):
    """Not what a formula says of the step: here they differ on purpose."""
    from transformers import TrainerCallback

    from tests.test_faults import make_trainer

    class Halve(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 7:
                for group in kwargs["optimizer"].param_groups:
                    group["lr"] *= 0.5

    trainer = make_trainer(shards, tmp_path / "run", 9)
    trainer.add_callback(Halve())
    trainer.train()
    trainer.recorder.close()
    rate = trainer.args.learning_rate
    assert [row["learning_rate"] for row in read_ledger(tmp_path / "run")][5:] == [rate, rate, 0.5 * rate, rate]


@pytest.mark.first(1)
@pytest.mark.parametrize(("flag", "value"), [("weight_decay", 0.5), ("learning_rate", 0.0005), ("adam_beta1", 0.5)])
def test_a_change_that_a_resume_is_allowed_reaches_the_optimizer(tmp_path, finished, flag, value):
    """A checkpoint has the options of its optimizer too, and loading it puts them back."""
    import shutil

    import torch

    run = shutil.copytree(finished, tmp_path / "run")
    done = run_script(
        "--output_dir", str(run), "--resume_from_checkpoint", "true", "--max_steps", "41", f"--{flag}", str(value),
        "--allow_changes", flag, "--save_steps", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    groups = torch.load(run / "checkpoint-41" / "optimizer.pt", weights_only=True)["param_groups"]
    name = {"learning_rate": "initial_lr", "adam_beta1": "betas"}.get(flag, flag)
    values = [group[name][0] if name == "betas" else group[name] for group in groups]
    assert value in values, values
