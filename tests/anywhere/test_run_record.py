"""What `RunRecord` writes of a Trainer's steps, and what it refuses because it could not be exact."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

from slimpajama_hf import ExactCheckpoints, ExactStream, RunRecord
from slimpajama_hf.anywhere.seen_numbers import SeenNumbers
from slimpajama_hf.errors import UserError
from slimpajama_hf.record import checkpoints
from tests.conftest import read_ledger


def stream_of(texts: str, **settings) -> ExactStream:
    return ExactStream(texts, "builtin", **({"max_length": 32} | settings))


def small_model(stream: ExactStream) -> GPT2LMHeadModel:
    set_seed(1)
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(stream.tokenizer), n_layer=1, n_embd=16, n_head=2, n_positions=32))


def arguments(run: Path, **settings) -> TrainingArguments:
    usual = {"max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 2, "use_cpu": True, "disable_tqdm": True}
    return TrainingArguments(str(run), **usual | settings)


def trainer_of(texts: str, run: Path, record=RunRecord, stream: ExactStream | None = None, **settings) -> Trainer:
    stream = stream if stream is not None else stream_of(texts)
    callbacks = [record(run, stream, report=False)] if record is not None else []
    return Trainer(
        small_model(stream),
        arguments(run, **settings),
        train_dataset=stream,
        data_collator=stream.collate,
        callbacks=callbacks,
    )


class Norms(TrainerCallback):
    """What the Trainer itself says of each step."""

    def __init__(self) -> None:
        self.said: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "grad_norm" in logs:
            self.said.append(logs)


def test_a_row_has_what_the_step_learned(texts, tmp_path):
    """The loss is the mean over the tokens of all its batches, recomputed here; norm and rate are the Trainer's."""
    run, norms = tmp_path / "run", Norms()
    trainer = trainer_of(texts, run, gradient_accumulation_steps=2, logging_steps=1, max_grad_norm=0.5)
    trainer.add_callback(norms)
    trainer.model.eval()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer.train()
    rows = read_ledger(run)
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and all(len(row["samples"]) == 4 for row in rows)
    trainer.model.load_state_dict(before)
    samples = list(stream_of(texts))
    nats, right, count = 0.0, 0, 0
    with torch.no_grad():
        for sample in samples[:4]:
            ids = torch.tensor([sample["input_ids"]])
            logits, targets = trainer.model(input_ids=ids).logits[0, :-1], ids[0, 1:]
            nats += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
            right += (logits.argmax(-1) == targets).sum().item()
            count += len(targets)
    assert rows[0]["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert rows[0]["accuracy"] == pytest.approx(right / count)
    assert rows[0]["tokens"] == sum(len(sample["input_ids"]) for sample in samples[:4])
    # Trainer rounds nothing here; the norm is the one before clipping.
    assert [row["grad_norm"] for row in rows] == pytest.approx([each["grad_norm"] for each in norms.said], rel=1e-6)
    assert [row["learning_rate"] for row in rows] == pytest.approx([each["learning_rate"] for each in norms.said])
    assert rows[0]["grad_norm"] > 0.5


def test_a_collator_that_masks_is_said(texts, tmp_path, capfd):
    run, stream = tmp_path / "run", stream_of(texts)
    trainer = trainer_of(texts, run, stream=stream)

    def masks(items):
        batch = stream.collate(items)
        batch["labels"][:, :4] = -100
        return batch

    trainer.data_collator = masks
    trainer.train()
    assert capfd.readouterr().err.count("where its samples have") == 1
    assert all(math.isfinite(row["loss"]) for row in read_ledger(run))


def test_losses_that_nobody_sees_are_said_to_be_missing(texts, tmp_path, capfd):
    run = tmp_path / "run"
    trainer_of(texts, run, label_smoothing_factor=0.1).train()
    assert capfd.readouterr().err.count("the ledger has no losses") == 1
    rows = read_ledger(run)
    assert [row["loss"] for row in rows] == [None] * 4 and rows[0]["grad_norm"] > 0


def test_the_stream_ends_inside_a_step(texts, tmp_path, capfd):
    """What fills no step is said; every other document is in the ledger once, and training does not begin anew."""
    run = tmp_path / "run"
    trainer_of(texts, run, gradient_accumulation_steps=7, max_steps=1000, save_steps=1000).train()
    total = len(list(stream_of(texts)))
    rows = read_ledger(run)
    learned = [(sample["shard"], sample["row"]) for row in rows for sample in row["samples"]]
    assert len(learned) == len(set(learned)) == total - total % 14
    assert "batches were read and not learned" in capfd.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_has_its_steps_makes_no_more(texts, tmp_path, capfd, workers):
    """The Trainer alone would make one step beyond max_steps whenever it is started again."""
    run = tmp_path / "run"
    for _ in range(2):
        trainer = trainer_of(texts, run, max_steps=2, dataloader_num_workers=workers)
        trainer.train(resume_from_checkpoint=RunRecord.newest(run))
        assert len(read_ledger(run)) == trainer.state.global_step == 2
    assert "nothing left to do: the run has its 2 steps; raise max_steps" in capfd.readouterr().err


def test_a_run_that_has_read_all_goes_on_to_nothing(texts, tmp_path, capfd):
    """accelerate's loader takes no stream that is empty."""
    run, file = tmp_path / "run", texts.replace("*", "0")
    for steps in (10, 11):
        stream = stream_of(file, mode="window")
        trainer = trainer_of(
            file, run, stream=stream, max_steps=1000 * steps, save_steps=1, per_device_train_batch_size=64
        )
        trainer.train(resume_from_checkpoint=RunRecord.newest(run))
    rows = read_ledger(run)
    assert sum(max(len(row["samples"]), 1) for row in rows) == len(list(stream_of(file, mode="window")))
    assert "the stream has no more samples" in capfd.readouterr().err


def test_a_resume_that_is_not_the_same_run_is_refused(texts, tmp_path):
    run = tmp_path / "run"
    trainer_of(texts, run).train()
    with pytest.raises(UserError, match="holds a run with checkpoints"):
        trainer_of(texts, run, max_steps=6).train()
    for name, value in (("max_length", 16), ("shuffle_buffer", 4), ("mode", "window")):
        other = trainer_of(texts, run, stream=stream_of(texts, **{name: value}), max_steps=6)
        with pytest.raises(UserError, match=f"begun with ExactStream\\({name}="):
            other.train(resume_from_checkpoint=True)
    weights = checkpoints.path_of(run, 4) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"not a whole checkpoint.*checkpoint-2"):
        trainer_of(texts, run, max_steps=6).train(resume_from_checkpoint=True)
    assert RunRecord.newest(run) == str(checkpoints.path_of(run, 2))
    trainer_of(texts, run, max_steps=6).train(resume_from_checkpoint=RunRecord.newest(run))
    assert [row["step"] for row in read_ledger(run)] == list(range(6))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"save_only_model": True}, "no run can go on"),
        ({"dataloader_in_order": False, "dataloader_num_workers": 2}, "in_order"),
    ],
)
def test_what_cannot_be_exact_is_refused(texts, tmp_path, settings, words):
    with pytest.raises(UserError, match=words):
        trainer_of(texts, tmp_path / "run", **settings).train()


def test_a_record_that_comes_too_late_or_of_another_folder_is_refused(texts, tmp_path):
    stream = stream_of(texts)
    trainer = trainer_of(texts, tmp_path / "run", None, stream)
    trainer.add_callback(RunRecord(tmp_path / "run", stream))
    with pytest.raises(UserError, match=r"attach\(trainer\)"):
        trainer.train()
    trainer = Trainer(
        small_model(stream),
        arguments(tmp_path / "a"),
        train_dataset=stream,
        callbacks=[RunRecord(tmp_path / "b", stream)],
    )
    with pytest.raises(UserError, match="give both the same folder"):
        trainer.train()
    trainer = trainer_of(texts, tmp_path / "run", stream=stream)
    trainer.train_dataset = stream_of(texts)
    with pytest.raises(UserError, match="a stream that this loader does not read"):
        trainer.train()


def test_a_loop_that_steps_without_a_batch_is_told(texts, tmp_path):
    stream = stream_of(texts)
    record = RunRecord(tmp_path / "run", stream, report=False)
    record.begin(small_model(stream))
    for _ in record.batches(torch.utils.data.DataLoader(stream, batch_size=2, collate_fn=stream.collate)):
        record.step(1.0, learning_rate=0.1)
        with pytest.raises(UserError, match="without a batch"):
            record.step(1.0, learning_rate=0.1)
        break
    record.close()


def test_the_norm_that_is_clipped_by_is_torchs_own_again(texts, tmp_path):
    own = torch.nn.utils.clip_grad_norm_
    trainer_of(texts, tmp_path / "run").train()
    assert torch.nn.utils.clip_grad_norm_ is own
    seen = SeenNumbers()
    seen.begin(torch.nn.Linear(1, 1))
    seen.begin(torch.nn.Linear(1, 1))
    seen.end()
    assert torch.nn.utils.clip_grad_norm_ is own


class Ask(TrainerCallback):
    """Asks for a checkpoint at step 3."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_save |= state.global_step == 3


@pytest.mark.parametrize("kind", ["record", "checkpoints"])
def test_checkpoints_are_whole_and_kept_by_their_number(texts, tmp_path, kind):
    run, stream = tmp_path / "run", stream_of(texts)
    own = RunRecord(run, stream, report=False) if kind == "record" else ExactCheckpoints()
    trainer = Trainer(
        small_model(stream),
        arguments(run, save_total_limit=2),
        train_dataset=stream,
        data_collator=stream.collate,
        callbacks=[Ask(), own],
    )
    trainer.train()
    assert checkpoints.steps(run) == [3, 4] and not list(run.glob("_staging*"))
    assert trainer.args.output_dir == str(run)
    for step in (3, 4):
        assert checkpoints.problem(checkpoints.path_of(run, step)) is None
    assert ExactCheckpoints.newest(run) == str(checkpoints.path_of(run, 4))
    state = json.loads((checkpoints.path_of(run, 4) / "trainer_state.json").read_text())
    assert state["global_step"] == 4


def test_the_best_checkpoint_is_named_by_its_place_and_kept(texts, tmp_path):
    run, stream = tmp_path / "run", stream_of(texts)
    held_out = [stream.collate([item]) for item in list(stream)[-2:]]
    trainer = Trainer(
        small_model(stream),
        arguments(run, max_steps=6, save_total_limit=1, eval_strategy="steps", eval_steps=2,
                  load_best_model_at_end=True, metric_for_best_model="loss"),
        train_dataset=stream,
        eval_dataset=[{name: value[0] for name, value in each.items()} for each in held_out],
        data_collator=lambda items: stream.collate([{"input_ids": list(each["input_ids"])} for each in items]),
        callbacks=[RunRecord(run, stream, report=False)],
    )  # fmt: skip
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == run and checkpoints.problem(best) is None


def test_a_checkpoint_that_is_asked_for_behind_it_is_refused(texts, tmp_path):
    run, stream = tmp_path / "run", stream_of(texts)
    trainer = Trainer(
        small_model(stream), arguments(run), train_dataset=stream, data_collator=stream.collate,
        callbacks=[RunRecord(run, stream), Ask()],
    )  # fmt: skip
    with pytest.raises(UserError, match="put it before this one"):
        trainer.train()
