"""What updates teach: the ledger has the losses that the weights before and after give, training does not know of it,
and means of noise are called noise."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slimpajama_hf.corpus import opening
from slimpajama_hf.model.gpt2_step import GPT2Step
from slimpajama_hf.record import checkpoints, teaching
from slimpajama_hf.record.teaching import Fall, Taught
from slimpajama_hf.samples.stream import SampleStream
from tests.conftest import NANO, make_records, read_ledger, run_command, run_script, write_records
from tests.test_faults import CLOCK, make_trainer, poison, rows_without_times


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_records(folder / "0.jsonl.zst", make_records(300, seed=11))
    return folder


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the trainer is in this process it looks at every seventh step."""
    monkeypatch.setattr(teaching, "STEPS_BETWEEN", 7)


def trained(corpus: Path, run: Path, steps: int = 72, **options: Any) -> Any:
    trainer = make_trainer(corpus, run, steps, **options)
    trainer.train()
    trainer.recorder.close()
    return trainer


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(teaching, "STEPS_BETWEEN", 7)
        trained(corpus, folder)
    return folder


def loss_at(run: Path, checkpoint: int, input_ids: list[int]) -> float:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoints.path_of(run, checkpoint))
    ids = torch.tensor([input_ids])
    with torch.no_grad():
        return torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:]).item()


def test_the_ledger_has_what_the_weights_before_and_after_say(run, corpus, encoder):
    """By transformers' own forward, from the checkpoints beside two of the steps."""
    rows = read_ledger(run)
    assert [row["step"] for row in rows if row["loss_after"] is not None] == list(range(6, 72, 7))
    assert [row["step"] for row in rows if row["next_loss"] is not None] == list(range(6, 72, 7))
    documents = [sample.input_ids for sample, _ in
                 zip(SampleStream(opening.open_corpus(f"{corpus}/*.jsonl.zst"), encoder, "truncate", 64), rows, strict=False)]  # fmt: skip
    assert rows[20]["next_loss"] == pytest.approx(loss_at(run, 20, documents[21]), abs=1e-5)
    assert rows[69]["loss_after"] == pytest.approx(loss_at(run, 70, documents[69]), abs=1e-5)
    assert rows[70]["loss"] == pytest.approx(loss_at(run, 70, documents[70]), abs=1e-5), "after the update of step 69"


@pytest.mark.first(1)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_forward_alone_is_the_steps_own_to_the_bit(corpus, tmp_path, precision):
    step = GPT2Step(make_trainer(corpus, tmp_path / "run", 1).model, precision, 64)
    for length in (2, 31, 64):
        ids = torch.arange(100, 100 + length)
        loss = step(ids).loss
        gradients = step.gradients.clone()
        assert torch.equal(step.loss_alone(ids), loss) and torch.equal(step.gradients, gradients)


def test_training_does_not_know_of_it(run, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(teaching, "STEPS_BETWEEN", 10**9)
    trained(corpus, tmp_path / "alone")
    looked, alone = (
        [{name: value for name, value in row.items() if name not in CLOCK | {"chain", "loss_after", "next_loss"}}
         for row in read_ledger(folder)]
        for folder in (run, tmp_path / "alone")
    )  # fmt: skip
    assert looked == alone
    for name in ("model.safetensors", "rng_state.pth", "data_state.json"):
        left, right = (folder / "checkpoint-70" / name for folder in (run, tmp_path / "alone"))
        assert left.read_bytes() == right.read_bytes(), name


def test_an_update_teaches_its_own_document(run):
    taught = [row["loss"] - row["loss_after"] for row in read_ledger(run) if row["loss_after"] is not None]
    assert min(taught) > 0


@pytest.mark.slow
def test_a_run_that_goes_on_has_the_same_numbers(corpus, tmp_path):
    """By the command line, which looks at steps 126 and 253: stopped before the first, and when its next document was
    read and not learned."""

    def to(name: str, steps: int) -> Path:
        done = run_script(
            *NANO, "--dataset", f"{corpus}/*.jsonl.zst", "--max_steps", str(steps), "--output_dir", str(tmp_path / name),
            "--warmup_steps", "20", "--max_seq_length", "32", "--save_steps", "1000", "--viz_interval", "100000",
            "--display_samples", "100000", "--resume_from_checkpoint", "true",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return tmp_path / name

    whole = to("whole", 256)
    for steps in (126, 127, 256):
        parted = to("parted", steps)
    assert rows_without_times(whole) == rows_without_times(parted)
    assert [row["step"] for row in read_ledger(whole) if row["next_loss"] is not None] == [126, 253]
    said = run_command("inspect", str(whole), "--step", "126")
    assert f"loss {read_ledger(whole)[126]['loss_after']:.4f} after its own update" in said.stdout, said.stderr


def test_a_skipped_update_teaches_nothing(corpus, tmp_path):
    trainer = make_trainer(corpus, tmp_path / "run", 16)
    poison(trainer, {13})
    trainer.train()
    trainer.recorder.close()
    rows = read_ledger(tmp_path / "run")
    assert rows[13]["update_skipped"] and rows[13]["loss_after"] is None and rows[13]["next_loss"] is None
    assert rows[6]["loss_after"] is not None


def test_where_autograd_computes_nobody_looks(corpus, tmp_path):
    trained(corpus, tmp_path / "run", 10, backward="autograd")
    assert all(row["loss_after"] is row["next_loss"] is None for row in read_ledger(tmp_path / "run"))


@pytest.mark.first(1)
@pytest.mark.parametrize("mode", ["window", "pack"])
@pytest.mark.long
def test_a_later_part_of_the_same_document_is_not_held_out(corpus, tmp_path, monkeypatch, mode):
    trainer = make_trainer(corpus, tmp_path / "run", 70)
    trainer.stream.mode = mode
    trainer.train()
    trainer.recorder.close()
    rows = read_ledger(tmp_path / "run")
    looked = [step for step in range(6, 69, 7) if rows[step]["loss_after"] is not None]
    assert looked == ([] if mode == "pack" else list(range(6, 69, 7)))
    for step in range(6, 69, 7):
        new = mode == "window" and rows[step + 1]["part"] == 0
        assert (rows[step]["next_loss"] is not None) == new


def test_what_was_learned_in_an_earlier_pass_is_not_held_out(tmp_path):
    write_records(tmp_path / "corpus" / "0.jsonl.zst", make_records(20, seed=3))
    trainer = make_trainer(tmp_path / "corpus", tmp_path / "run", 40)
    trainer.stream.passes = type(trainer.stream.passes)(trainer.stream.corpus, 3)
    trainer.train()
    trainer.recorder.close()
    rows = read_ledger(tmp_path / "run")
    assert [row["step"] for row in rows if row["next_loss"] is not None] == [6, 13]
    assert [row["step"] for row in rows if row["loss_after"] is not None] == [6, 13, 20, 27, 34]


# ---- the numbers ----


def columns(steps: int, same: float, other: float, seed: int = 0, unlike: float = 0.0) -> dict[str, Any]:
    """A ledger in which every seventh update lowers the next loss by `same` or `other` with noise of 0.02, those of
    domain 2 by `unlike` more."""
    draw = np.random.default_rng(seed)
    domain = draw.integers(0, 3, steps)
    loss = draw.normal(4, 1, steps)
    due = np.arange(steps) % 7 == 6
    akin = np.append(domain[1:], -1) == domain
    fall = np.where(akin, same, other) + unlike * (domain == 2) + draw.normal(0, 0.02, steps)
    return {
        "loss": loss,
        "loss_after": np.where(due, loss - 0.15 + draw.normal(0, 0.02, steps), np.nan),
        "next_loss": np.where(due, np.append(loss[1:], np.nan) + fall, np.nan),
        "learning_rate": np.minimum(1.0, (np.arange(steps) + 1) / 100),
        "domain": domain,
        "names": ["a", "b", "c"],
    }


def test_it_finds_what_is_there():
    whole, domains = teaching.by_domain(**columns(7000, 0.01, -0.01))
    assert whole.own.count == sum(each.own.count for each in domains) == len(range(104, 7000, 7))
    assert whole.own.mean == pytest.approx(0.15, abs=0.005)
    for fall, truth in ((whole.same, 0.01), (whole.other, -0.01)):
        assert fall.stands_out and fall.mean == pytest.approx(truth, abs=3 * fall.error)
    assert whole.same.error == pytest.approx(0.02 / whole.same.count**0.5, rel=0.2)
    words = teaching.in_words(whole, domains)
    assert words == (
        f"an update changes the loss of its own document by {-(whole.own.mean or 0):+.4f} ± {whole.own.error:.4f} nats per "
        f"token; of the next document, not learned yet, where it has the same domain: {-(whole.same.mean or 0):+.4f} ± "
        f"{whole.same.error:.4f}, another: {-(whole.other.mean or 0):+.4f} ± {whole.other.error:.4f} "
        f"({whole.own.count} measured); {teaching.verdict(domains)}"
    )


def test_noise_is_called_noise():
    """Of runs whose updates do nothing for the next document few may say otherwise: two standard errors, 1 in 20."""
    claims = differences = 0
    for seed in range(60):
        whole, domains = teaching.by_domain(**columns(2100, 0.0, 0.0, seed))
        claims += whole.same.stands_out + whole.other.stands_out
        differences += bool(teaching.differ([each.other for each in domains]))
    assert claims <= 12 and differences <= 8
    quiet = teaching.by_domain(**columns(2100, 0.0, 0.0, 1))
    assert str(teaching.in_words(*quiet)).count("(within noise)") == 2


def test_domains_that_differ_are_told_apart():
    _, domains = teaching.by_domain(**columns(7000, 0.0, 0.0, unlike=0.02))
    assert teaching.differ([each.other for each in domains])
    assert "domains differ" in teaching.verdict(domains)
    assert teaching.differ([Fall(teaching.FEWEST - 1, 1.0, 0.1), Fall(50, 0.0, 0.1)]) is None
    assert teaching.verdict([]) == "too few to tell domains apart"


def test_too_little_is_nothing_yet():
    whole, domains = teaching.by_domain(**columns(100, 0.0, 0.0))
    assert whole.own.count <= 1 and teaching.in_words(whole, domains) is None
    empty = np.zeros(0)
    whole, domains = teaching.by_domain(empty, empty, empty, empty, empty.astype(int), [])
    assert whole == Taught("all", *[Fall(0, None, None)] * 3) and domains == []
    assert not Fall(50, 0.0, 0.0).stands_out and not math.isnan(whole.own.count)
