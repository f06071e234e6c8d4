"""The parts that are imported by themselves: each in a Trainer or a loop that is not ours."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, set_seed

from slimpajama_hf import ExactStream, RunRecord, StepCharts, TurnedMuon, WeightAverage, noise_scale
from slimpajama_hf.errors import UsageError, UserError
from slimpajama_hf.model.optimization import AdamWWithMuon
from slimpajama_hf.record import checkpoints
from tests.anywhere.test_run_record import arguments, small_model, stream_of


def trained(texts: str, run: Path, callbacks, steps: int = 6, **more) -> Trainer:
    """A Trainer that has trained on the stream, from its newest checkpoint if it has one."""
    stream = stream_of(texts)
    model = small_model(stream)
    made = {name: value(model) for name, value in more.items() if name == "optimizers"}
    trainer = Trainer(
        model,
        arguments(run, max_steps=steps, logging_steps=1, learning_rate=1e-2),
        train_dataset=stream,
        data_collator=stream.collate,
        callbacks=[*callbacks, RunRecord(run, stream, report=False)],
        **made,
    )
    trainer.train(resume_from_checkpoint=RunRecord.newest(run))
    return trainer


def test_turned_muon_learns_and_goes_on_exactly(texts, tmp_path):
    def muon(model):
        return TurnedMuon(model, lr=1e-2, documents=2), None

    run = tmp_path / "run"
    whole = trained(texts, run, [], optimizers=muon)
    for step in (4, 6):
        shutil.rmtree(checkpoints.path_of(run, step))
    again = trained(texts, run, [], optimizers=muon)
    for left, right in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_turned_muon_is_the_optimizer_of_our_own_runs():
    """The same updates, bit for bit, as the one that the program makes of the Trainer's AdamW."""
    torch.manual_seed(0)
    stream_like = torch.randint(0, 100, (1, 16))
    models = [small_model_of(100) for _ in range(2)]
    groups = [
        {"params": [each for each in models[0].parameters() if each.ndim >= 2], "weight_decay": 0.1},
        {"params": [each for each in models[0].parameters() if each.ndim < 2], "weight_decay": 0.0},
    ]
    own = AdamWWithMuon.of(torch.optim.AdamW(groups, lr=1e-2), models[0], 0.5, torch.float32, by_row=True)
    theirs = TurnedMuon(models[1], lr=1e-2, weight_decay=0.1, hidden_rate=0.5)
    for _ in range(40):
        for model, optimizer in zip(models, (own, theirs), strict=True):
            optimizer.zero_grad()
            model(input_ids=stream_like, labels=stream_like).loss.backward()
            optimizer.step()
    for left, right in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(left, right)
    assert theirs.matrices


def small_model_of(vocabulary: int) -> GPT2LMHeadModel:
    set_seed(1)
    still = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_layer=1, n_embd=16, n_head=2, n_positions=16, **still))


@pytest.mark.parametrize("settings", [{"documents": 0}, {"hidden_rate": 0.0}])
def test_turned_muon_refuses_what_cannot_be(settings):
    with pytest.raises(UsageError, match="expected"):
        TurnedMuon(small_model_of(10), **settings)
    with pytest.raises(UsageError, match="use AdamW"):
        TurnedMuon(torch.nn.Embedding(4, 4))


def test_the_average_is_saved_goes_on_and_is_applied(texts, tmp_path):
    run, average = tmp_path / "run", WeightAverage(half_life=2)
    trainer = trained(texts, run, [average])
    seen = []
    own = trainer.model.transformer.wte.weight.clone()
    with average.applied():
        seen.append(trainer.model.transformer.wte.weight.clone())
    assert torch.equal(trainer.model.transformer.wte.weight, own) and not torch.equal(seen[0], own)
    for step in (2, 4, 6):
        assert checkpoints.problem(checkpoints.path_of(run, step)) is None
    loaded = GPT2LMHeadModel.from_pretrained(checkpoints.path_of(run, 6) / "averaged")
    assert torch.equal(loaded.transformer.wte.weight, seen[0])
    for step in (4, 6):
        shutil.rmtree(checkpoints.path_of(run, step))
    again = WeightAverage(half_life=2)
    trainer = trained(texts, run, [again])
    with again.applied():
        assert torch.equal(trainer.model.transformer.wte.weight, seen[0])


def test_the_average_is_refused_where_it_would_not_be_verified(texts, tmp_path):
    stream, run = stream_of(texts), tmp_path / "run"
    trainer = Trainer(
        small_model(stream), arguments(run), train_dataset=stream, data_collator=stream.collate,
        callbacks=[RunRecord(run, stream, report=False), WeightAverage(half_life=1)],
    )  # fmt: skip
    with pytest.raises(UserError, match="put it before them"):
        trainer.train()
    with pytest.raises(UserError, match="nothing has been averaged"), WeightAverage().applied():
        pass
    with pytest.raises(UsageError, match="above 0"):
        WeightAverage(half_life=0)


def test_the_noise_scale_is_that_of_the_gradients(texts):
    """Of gradients g = G + noise with known variance: B = tr(S) / |G|^2, here 64 / 4."""
    torch.manual_seed(0)

    class Linear(torch.nn.Module):
        """Its gradient is what it is given."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(64))

        def forward(self, gradient):
            return {"loss": (self.weight * gradient).sum()}

    model, signal = Linear(), torch.full((64,), 0.25)
    model.weight.grad = kept = torch.ones(64)
    batches = ({"gradient": signal + torch.randn(64)} for _ in itertools.count())
    found = noise_scale(model, batches, measurements=200)
    assert found is not None and found.low < 16 < found.high and found.value == pytest.approx(16, rel=0.25)
    assert model.weight.grad is kept
    assert noise_scale(model, [], measurements=3) is None


def test_the_noise_scale_of_a_model_on_the_stream(texts):
    stream = stream_of(texts)
    model = small_model(stream)
    found = noise_scale(model, DataLoader(stream, batch_size=1, collate_fn=stream.collate), measurements=4, at_once=4)
    assert found is None or found.value > 0
    assert all(parameter.grad is None for parameter in model.parameters())
    bare = ({"input_ids": torch.ones(1, 4, dtype=torch.long)} for _ in range(4))
    with pytest.raises(UserError, match="labels"):
        noise_scale(model, bare)


def test_charts_of_any_trainer(texts, tmp_path):
    stream, run = stream_of(texts), tmp_path / "run"
    Trainer(
        small_model(stream), arguments(run, logging_steps=1), train_dataset=stream, data_collator=stream.collate,
        callbacks=[StepCharts(run, every=2)],
    ).train()  # fmt: skip
    assert (run / "training_latest.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "training_step_000004.png").is_file()
    with pytest.raises(UsageError, match="1 or more"):
        StepCharts(run, every=0)


def test_a_chart_that_fails_is_said_and_training_goes_on(texts, tmp_path, capfd):
    stream, place = stream_of(texts), tmp_path / "file"
    place.write_text("no folder")
    trainer = Trainer(
        small_model(stream), arguments(tmp_path / "run", logging_steps=1), train_dataset=stream,
        data_collator=stream.collate, callbacks=[StepCharts(place, every=1)],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 4
    assert capfd.readouterr().err.count("charts are not being drawn") == 1


def test_every_public_name_has_an_example():
    """In its docstring; `docs/two-lines.md` has them all."""
    for each in (ExactStream, RunRecord, StepCharts, TurnedMuon, WeightAverage, noise_scale):
        assert "\n        " in (each.__doc__ or ""), each
