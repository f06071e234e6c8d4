"""The parts of the trainer that can be looked at alone."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers import Trainer

from slimpajama_hf.bars import TrainingBar
from slimpajama_hf.corpus.documents import Cursor, Document
from slimpajama_hf.errors import UserError
from slimpajama_hf.model import presets as models
from slimpajama_hf.record.ledger import Ledger, last_rows
from slimpajama_hf.samples.sample import Sample
from slimpajama_hf.screen import Waiting, format_time
from slimpajama_hf.training import schedule
from slimpajama_hf.training.batches import collate
from slimpajama_hf.training.clock import TrainingClock
from slimpajama_hf.training.recorder import StepRecorder, shortest
from slimpajama_hf.training.schedule import get_learning_rate
from slimpajama_hf.training.step_numbers import SampleNumbers, Step, StepNumbers, pack
from slimpajama_hf.training.trainer import PRIVATE_HOOKS


@pytest.mark.parametrize("name", PRIVATE_HOOKS)
def test_private_hooks_of_the_trainer_are_where_we_take_them(name):
    signature = inspect.signature(getattr(Trainer, name))
    plain = ", ".join(
        parameter.name + ("" if parameter.default is parameter.empty else f"={parameter.default}")
        for parameter in signature.parameters.values()
    )
    assert f"({plain})" == PRIVATE_HOOKS[name]


def test_learning_rate_of_the_first_steps_and_after():
    assert get_learning_rate(0, 1e-3, 1000) == pytest.approx(1e-6, rel=1e-12)
    assert get_learning_rate(1, 1e-3, 1000) == pytest.approx(2e-6, rel=1e-12)
    assert get_learning_rate(999, 1e-3, 1000) == get_learning_rate(10**6, 1e-3, 1000) == 1e-3
    assert get_learning_rate(0, 1e-3, 0) == 1e-3


def test_a_loaded_optimizer_goes_on_with_the_options_of_the_command_line():
    def made(lr, **options):
        weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
        groups = [{"params": weights[:1]}, {"params": weights[1:], "lr": lr / 2}]
        optimizer = torch.optim.AdamW(groups, lr=lr, **options)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))

    before, scheduler = made(1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    for _ in range(4):
        before.step()
        scheduler.step()
    optimizer, again = made(5e-4, weight_decay=0.3, betas=(0.8, 0.99))
    options = schedule.chosen(again)
    optimizer.load_state_dict(before.state_dict())
    again.load_state_dict(scheduler.state_dict())
    schedule.choose_again(again, options)
    assert [group["lr"] for group in optimizer.param_groups] == [5e-4 * 0.5, 2.5e-4 * 0.5]
    assert {(group["weight_decay"], group["betas"]) for group in optimizer.param_groups} == {(0.3, (0.8, 0.99))}
    again.step()
    assert [group["lr"] for group in optimizer.param_groups] == [5e-4 * 0.6, 2.5e-4 * 0.6]


def sample(tokens: int = 5) -> Sample:
    document = Document("text", "RedPajamaC4", "local", "a.jsonl", 3, "f" * 40, 4)
    return Sample(list(range(tokens)), document, Cursor(0, "a.jsonl", 4), 4, skipped={"blank": 2})


def test_a_batch_is_one_sample_with_its_labels():
    batch = collate([sample()])
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3, 4]] == batch["labels"].tolist()
    with pytest.raises(ValueError):
        collate([sample(), sample()])


def test_the_recorder_writes_every_step_in_order_and_waits_for_no_device(tmp_path):
    recorder = StepRecorder(Ledger(tmp_path / "ledger.jsonl"), vocab_size=16)
    heard = []
    recorder.listeners.append(lambda row: heard.append(row["step"]))
    for step in range(5):
        values = SampleNumbers.pack(torch.tensor(2.5), torch.tensor(3.0), torch.tensor([1.0, 2.0, 3.0, 4.0]))
        numbers = StepNumbers(grad_norm=torch.tensor(0.1), not_finite=torch.tensor(0.0))
        recorder.add(Step(step, sample(), 1e-3, 0.5), pack(numbers, [values]))
    recorder.close()
    assert heard == [0, 1, 2, 3, 4]
    (last,) = last_rows(tmp_path / "ledger.jsonl", 1)
    assert (last["loss"], last["accuracy"], last["throughput"]) == (2.5, 0.75, 10.0)
    assert last["grad_norm"] == 0.1
    assert last["code_bits"] == pytest.approx((2.5 * 4 + torch.log(torch.tensor(16.0)).item()) / 0.6931471805599453)
    assert last["skipped"] == {"blank": 2}


def test_shortest_reads_back_as_the_same_float32():
    for value in [*torch.randn(200).tolist(), 1e-30, 3e38, 0.1]:
        as_float32 = torch.tensor(value).item()
        assert torch.tensor(shortest(as_float32)).item() == as_float32
    assert str(shortest(float("nan"))) == "nan"


def test_the_clock_leaves_out_what_is_not_training():
    now = [0.0]
    clock = TrainingClock(lambda: now[0])
    now[0] = 5.0
    clock.start()
    now[0] = 7.0
    with clock.paused():
        now[0] = 10.0
    now[0] = 11.0
    assert clock.lap() == 3.0
    now[0] = 12.0
    assert clock.lap() == 1.0
    assert (clock.training_seconds, clock.paused_seconds) == (4.0, 3.0)


@pytest.mark.parametrize(("seconds", "text"), [(0, "0.0s"), (12.34, "12.3s"), (37.8 * 60, "37.8m"), (9000, "2.5h")])
def test_format_time(seconds, text):
    assert format_time(seconds) == text


def test_the_bar_counts_this_sessions_steps_alone(capsys):
    now = [0.0]
    bar = TrainingBar(total=100, done=90, clock=lambda: now[0])
    now[0] = 20.0
    bar.update(loss=2.0, accuracy=0.25, learning_rate=1e-3, tokens=256, seconds=2.0)
    line = capsys.readouterr().err.strip()
    assert (
        line
        == "Training:  91%|█████████ | 91/100 [00:20<00:18, loss=2.0000, acc=25.0%, tps=128.0, lr=1.00e-03, eta=18.0s]"
    )
    now[0] = 21.0
    bar.update(loss=2.0, accuracy=0.25, learning_rate=1e-3, tokens=256, seconds=2.0)
    assert capsys.readouterr().err == "", "a log file gets a line every so often, not one a step"


def test_waiting_moves_at_least_every_two_seconds(capsys):
    import time

    with Waiting("one thing") as waiting:
        time.sleep(2.1)
        waiting("another thing")
        time.sleep(2.0)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2
    assert "one thing" in lines[0] and "another thing" in lines[-1]


@pytest.fixture(scope="module")
def tokenizer():
    from slimpajama_hf.samples.tokenizer import load_tokenizer

    return load_tokenizer("builtin")


@pytest.mark.parametrize(
    ("name", "millions"), [("tiny", 5.3), ("small", 124.4), ("medium", 354.8), ("gpt2-small", 124.4)]
)
def test_presets_have_the_sizes_that_they_are_named_for(tokenizer, name, millions):
    config = models.model_config(name, None, tokenizer, 256)
    if name != "tiny":
        config.vocab_size = 50257
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    assert parameters / 1e6 == pytest.approx(millions, abs=0.1)
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0, 0, 0)


def test_a_config_json_is_obeyed(tokenizer, tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "attn_pdrop": 0.3}')
    config = models.model_config(str(path), "n_layer=3,activation_function=relu", tokenizer, 64)
    assert (config.n_layer, config.n_embd, config.attn_pdrop, config.resid_pdrop) == (3, 32, 0.3, 0.0)
    assert (config.activation_function, config.vocab_size) == ("relu", 4096)
    model = models.build(config, seed=1)
    assert model.loss_type == "ForCausalLM"
    again = models.build(config, seed=1)
    assert all(torch.equal(left, right) for left, right in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("overrides", ["n_layer", "n_layer=two", "n_layer=1.5", "=3", "no_such_thing=3"])
def test_wrong_overrides_are_refused(tokenizer, overrides):
    with pytest.raises(UserError, match="--config_overrides"):
        models.model_config("tiny", overrides, tokenizer, 64)


@pytest.mark.parametrize("content", ["{", "{}", '{"model_type": "no such"}', "[1]"])
def test_a_file_that_is_no_configuration_is_refused(tokenizer, tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(UserError, match="not a model configuration"):
        models.model_config(str(path), None, tokenizer, 64)
