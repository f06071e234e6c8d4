"""What a run says that it needs, and what happens where that is not there."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from slimpajama_hf.errors import UserError
from slimpajama_hf.model import averaging, gpt2_step, memory, optimization, products
from slimpajama_hf.model import presets as models
from slimpajama_hf.record import noise, teaching
from slimpajama_hf.settings.update_rules import UpdateRules
from slimpajama_hf.training import saving
from tests.conftest import NANO, ROOT, environment, make_records, read_ledger, write_records
from tests.test_faults import make_trainer

OUT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 476.00 MiB. GPU 0 has a total capacity of 3.81 GiB")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    write_records(folder / "a.jsonl.zst", make_records(60, seed=5))
    return folder


# ---- what is needed ----

SIZES = [("small", "float32"), ("small", "bfloat16"), ("medium", "bfloat16")]


class Counted(TorchDispatchMode):
    """Bytes of all tensors that are alive, from birth to death, and the most there were."""

    def __init__(self):
        super().__init__()
        self._live: set[int] = set()
        self.now = self.peak = 0

    def note(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata in self._live:
            return
        self._live.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())

    def _drop(self, key, size):
        self._live.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        for value in pytree.tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.note(value)
        return result


def gpt2(size: str) -> object:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            **models.PRESETS[size], vocab_size=50257, activation_function="gelu_pytorch_tanh", **models.NO_DROPOUT
        )
    )


def count(size: str, precision: str) -> float:
    """Bytes alive at once in a run, noise measurement included, by its real tensors without their contents."""
    counted = Counted()
    network = gpt2(size)
    for weight in network.parameters():
        counted.note(weight)
    with counted:
        adamw = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
        optimizer = optimization.AdamWWithMuon.of(adamw, network, 0.2, torch.float32, by_row=True)
        step = gpt2_step.GPT2Step(network, precision, 256, print, optimizer.matrices)
        step._record = None  # captured or not, as many are alive
        average = averaging.WeightAverage(network, 0.06)
        others = torch.zeros_like(step.gradients)
        step(torch.zeros(256, dtype=torch.long, device=network.device))
        del average, others
    # Made at the first update: the moments. That they are as many is tested where they are (test_optimization.py).
    return counted.peak + optimization.moments_bytes(network, UpdateRules())


def planned(size: str, precision: str, device: str) -> memory.Needs:
    with torch.device("meta"):
        network = gpt2(size)
    return memory.needs(
        network, 256, precision, True, UpdateRules(), written_out=True, measures_noise=True, device=device
    )  # fmt: skip


@pytest.mark.parametrize(("size", "precision"), SIZES)
def test_the_plan_is_what_the_tensors_of_a_cpu_take(monkeypatch, size, precision):
    from torch._subclasses.fake_tensor import FakeTensorMode

    # Packing, and what looks into the values, is nothing for tensors without contents.
    monkeypatch.setattr(products, "_onednn", lambda dtype: False)
    monkeypatch.setattr(torch, "unique", lambda ids: ids)
    monkeypatch.setattr(gpt2_step.GPT2Step, "_guessed", lambda self, logits, *rest: logits.argmax(1).sum())
    with FakeTensorMode():
        counted = count(size, precision)
    need = planned(size, precision, "cpu")
    if precision == "bfloat16":
        with torch.device("meta"):
            counted += 2 * optimization.elements_by_muon(gpt2(size), UpdateRules())
    assert need.total_bytes == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize(("size", "precision"), SIZES)
def test_the_plan_is_what_the_tensors_of_a_gpu_take(size, precision):
    """By the branches of everything that is no CPU. Attention of `meta` keeps its weights, the kernels of CUDA do not."""
    with torch.device("meta"):
        counted = count(size, precision)
    need = planned(size, precision, "cuda")
    assert counted * 0.97 < need.total_bytes < counted * 1.005


BY_ROW = UpdateRules()


def test_what_is_not_asked_for_is_not_counted():
    with torch.device("meta"):
        network = gpt2("small")
    count = network.num_parameters()
    assert count == sum(weight.numel() for weight in network.parameters())

    def total(averaged=True, how=BY_ROW, **more):
        more = {"written_out": True, "measures_noise": True, "device": "cuda"} | more
        return memory.needs(network, 256, "float32", averaged, how, **more).total_bytes

    muon = optimization.elements_by_muon(network, UpdateRules())
    by_element, adamw = UpdateRules(embedding_moment="element"), UpdateRules("adamw", 0.1, "element")
    assert total() - total(averaged=False) == 4 * count
    assert total(how=adamw) - total(how=by_element) == 4 * muon
    assert total(how=by_element) - total() == 4 * 50257 * (network.config.n_embd - 1)
    # Without it the most beside the steps is a passport.
    assert total() - total(measures_noise=False) == 4 * count - 8 * 256 * 50257
    assert total(processes=2, written_out=False) - total(written_out=False) == 4 * count
    assert total(processes=2, sharded=True) < total()


def warned(monkeypatch, free: int, averages: float = 0.06, length: int = 256, processes: int = 1) -> str | None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    monkeypatch.setattr(memory, "held_bytes", lambda model, device: 100)
    settings = SimpleNamespace(
        model=SimpleNamespace(average_weights=averages), data=SimpleNamespace(max_seq_length=length)
    )
    need = memory.Needs(10_000_000, 160_000_000, 30_000_000, 10_000_000)
    return memory.warning(None, torch.device("cpu"), need, settings, processes)


def test_the_run_is_warned_where_less_is_there_than_it_needs(monkeypatch):
    assert warned(monkeypatch, 199_999_900) is None, "what it holds already counts"
    said = warned(monkeypatch, 199_999_899)
    assert said is not None and "\n" not in said
    assert "needs about 200 MB of memory and the machine has 200 MB left" in said
    assert "--average_weights 0 (saves 40 MB), --max_seq_length 128 or a smaller --model" in said
    said = warned(monkeypatch, 150_000_000, averages=0, length=64)
    assert said is not None and "type a smaller --model" in said and "--average_weights" not in said
    assert warned(monkeypatch, 399_999_700, processes=2) is not None
    assert warned(monkeypatch, 399_999_800, processes=2) is None


def test_where_nobody_can_say_what_is_free_nothing_is_said(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    assert memory.warning(None, torch.device("cpu"), memory.Needs(1, 10**15, 0), None) is None


def test_free_memory_is_read():
    free = memory.free_bytes(torch.device("cpu"))
    assert free is not None and 10**7 < free < 10**14
    assert memory.free_bytes(torch.device("meta")) is None


# ---- what is not there ----


@pytest.mark.parametrize(
    "error",
    [OUT, MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
     RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
     RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)")],
)  # fmt: skip
def test_a_lack_of_memory_is_known_in_all_its_words(error):
    assert memory.is_out(error)
    with pytest.raises(UserError, match="while it was tried; leave it"), memory.said("it was tried", "leave it"):
        raise error
    assert memory.in_words(error) == "out of memory"


def test_a_real_allocator_says_so_too():
    with pytest.raises(UserError, match="out of memory while"), memory.said("a petabyte was asked for"):
        torch.empty(10**15)


def test_other_errors_are_left_alone():
    assert not memory.is_out(RuntimeError("shapes do not match")) and not memory.is_out(None)
    with pytest.raises(ValueError, match="no"), memory.said("x"):
        raise ValueError("no")


def trained(trainer, steps=14):
    trainer.train()
    trainer.recorder.flush()
    return [weight.detach().clone() for weight in trainer.model.parameters()]


@pytest.fixture(scope="module")
def unmeasured(corpus, tmp_path_factory):
    """A run in which nothing is measured."""
    run = tmp_path_factory.mktemp("unmeasured") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "STEPS_BETWEEN", 10**9)
        patch.setattr(teaching, "STEPS_BETWEEN", 10**9)
        return run, trained(make_trainer(corpus, run, 14))


def failing(trainer, where):
    """Have the device run out of memory there, in what is measured."""
    from slimpajama_hf.training.measuring import Measuring

    measuring = {"now": False}

    def raiser(*_arguments, **_named):
        raise OUT

    if where == "sum":
        zeros_like = torch.zeros_like
        # The buffer alone is as long as all gradients.
        size = trainer.model.num_parameters()
        return (torch, "zeros_like", lambda x, **named: raiser() if x.numel() == size else zeros_like(x, **named))
    if where in ("document", "step"):
        real, calls = gpt2_step.GPT2Step.__call__, []

        def call(self, ids):
            others = sys._getframe(1).f_code.co_name == "_other_gradients"
            calls.append(others)
            if where == "document" and others and calls.count(True) % 3 == 0:
                real(self, ids)  # what lies in the buffer of gradients is another's
                raise OUT
            if where == "step" and not others and calls[-2:-1] == [True]:
                self._views[0].fill_(7.0)
                raise OUT
            return real(self, ids)

        return (gpt2_step.GPT2Step, "__call__", call)
    if where == "compare":
        return (Measuring, "_compare", raiser)
    return (gpt2_step.GPT2Step, "loss_alone", raiser) if where == "teaching" else measuring


@pytest.mark.first(2)
@pytest.mark.parametrize("where", ["sum", "document", "step", "compare", "teaching"])
def test_what_is_only_measured_is_left_out_and_training_does_not_know(
    corpus, tmp_path, monkeypatch, unmeasured, where, capsys
):
    from slimpajama_hf.record.run_folder import RunFolder
    from slimpajama_hf.session import plan

    monkeypatch.setattr(noise, "STEPS_BETWEEN", 6)
    monkeypatch.setattr(teaching, "STEPS_BETWEEN", 4)
    trainer = make_trainer(corpus, tmp_path / "run", 14)
    monkeypatch.setattr(*failing(trainer, where))
    weights = trained(trainer)
    kind = "teaching" if where == "teaching" else "noise"
    said = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert len(said) == 1 and "left out; training goes on" in said[0], "once a kind"
    # Noise at steps 5 and 11; teaching before and after the updates of steps 3, 7 and 11 (fewer: no new document next).
    assert trainer.measuring.left_out.keys() == {kind} and trainer.measuring.left_out[kind] >= 2
    rows, plain = read_ledger(tmp_path / "run"), read_ledger(unmeasured[0])
    assert [row["loss"] for row in rows] == [row["loss"] for row in plain]
    assert [row["grad_norm"] for row in rows] == [row["grad_norm"] for row in plain]
    assert not any(row["update_skipped"] for row in rows)
    assert all(torch.equal(one, two) for one, two in zip(weights, unmeasured[1], strict=True))
    column = "loss_after" if kind == "teaching" else "grad_square"
    assert all(row[column] is None for row in rows)
    summary = plan.summary(RunFolder(tmp_path / "run"), trainer, "done", 0.0)
    assert any(
        f"not measured  {kind} {trainer.measuring.left_out[kind]} times, for lack of memory" in line for line in summary
    )


def test_what_is_measured_is_measured_otherwise(corpus, tmp_path, monkeypatch, unmeasured):
    """The other half of the test above: with memory there is something to leave out, and training is the same."""
    monkeypatch.setattr(noise, "STEPS_BETWEEN", 6)
    monkeypatch.setattr(teaching, "STEPS_BETWEEN", 4)
    trainer = make_trainer(corpus, tmp_path / "run", 14)
    weights = trained(trainer)
    rows = read_ledger(tmp_path / "run")
    assert [row["step"] for row in rows if row["grad_square"] is not None] == [5, 11] and not trainer.measuring.left_out
    assert [row["step"] for row in rows if row["loss_after"] is not None] == [3, 7, 11]
    assert all(torch.equal(one, two) for one, two in zip(weights, unmeasured[1], strict=True))


def test_a_half_made_update_is_neither_saved_nor_hidden(corpus, tmp_path, monkeypatch):
    trainer = make_trainer(corpus, tmp_path / "run", 30)
    real = optimization.AdamWWithMuon._step_matrices

    def step_matrices(self, group):
        if trainer.state.global_step == 13:
            raise OUT
        real(self, group)

    complete = saving.Saving._complete

    def late(self, checkpoint):
        time.sleep(2)  # checkpoint-10 is still being written when memory ends
        complete(self, checkpoint)

    monkeypatch.setattr(saving.Saving, "_complete", late)
    monkeypatch.setattr(optimization.AdamWWithMuon, "_step_matrices", step_matrices)
    with pytest.raises(UserError, match="update of step 13: it is half made, and not saved; go on from checkpoint-10"):
        trainer.train()
    trainer.save_now()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-10"]


@pytest.mark.parametrize(
    ("owner", "name", "said"),
    [
        (torch.nn.Module, "to", "while the model was moved to its device"),
        (averaging.WeightAverage, "__init__", "while the average of the weights was made; --average_weights 0"),
        (gpt2_step.GPT2Step, "__init__", "while the buffer of the gradients was made"),
        (optimization.AdamWWithMuon, "step", "in the update of step 0: it is half made, and not saved; start again"),
        (gpt2_step.GPT2Step, "squared_norms", "out of memory at step 0; close"),
    ],
)
def test_elsewhere_it_is_a_sentence(corpus, tmp_path, monkeypatch, owner, name, said):
    from slimpajama_hf.training import checkpointing

    def raiser(*_arguments, **_named):
        raise OUT

    if name == "to":
        # A model is built on the CPU, and moved by the Trainer.
        monkeypatch.setattr(checkpointing.Trainer, "_move_model_to_device", raiser)
    else:
        monkeypatch.setattr(owner, name, raiser)
    with pytest.raises(UserError, match=said) as refused:
        trainer = make_trainer(corpus, tmp_path / "run", 5)
        trainer._average_half_life = 0.06
        trainer.train()
    assert "\n" not in str(refused.value)


def test_weights_and_average_change_places_whole_or_not_at_all(monkeypatch):
    """However the weights lie, and whatever their number."""
    monkeypatch.setattr(averaging, "_PIECE", 7)
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 4))
    network[1].weight.data = torch.randn(3, 4).t()
    average = averaging.WeightAverage(network, 10)
    average.step(10)
    for weight in average._average:
        weight.add_(torch.randn(weight.shape))
    own = [weight.detach().clone() for weight in network.parameters()]
    other = [weight.clone() for weight in average._average]
    with average.applied():
        assert all(torch.equal(one, two) for one, two in zip(network.parameters(), other, strict=True))
        assert all(torch.equal(one, two) for one, two in zip(average._average, own, strict=True))
    assert all(torch.equal(one, two) for one, two in zip(network.parameters(), own, strict=True))

    def empty(*_arguments, **_named):
        raise OUT

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.Tensor, "clone", empty)
    with pytest.raises(torch.OutOfMemoryError), average.applied():
        pass
    assert all(torch.equal(one, two) for one, two in zip(network.parameters(), own, strict=True))


@pytest.mark.long
def test_the_whole_program_says_it(corpus, tmp_path):
    """Evaluation, samples and passports without memory: left out, each with its word. Too little memory: a warning."""
    code = (
        "import sys, torch\n"
        "from slimpajama_hf import program; from slimpajama_hf.training import evaluation; from slimpajama_hf.model import generation; from slimpajama_hf.model import memory; from slimpajama_hf.watching import passports\n"
        "def raiser(*a, **k): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 476.00 MiB')\n"
        "evaluation.score = generation.write_after = passports._log_probabilities = raiser\n"
        "memory.free_bytes = lambda device: 1000\n"
        "import run_clm_slimpajama\n"
        "sys.exit(program.run(run_clm_slimpajama.main))\n"
    )
    flags = [*NANO, "--max_seq_length", "64", "--dataset", f"{corpus}/*.jsonl.zst", "--max_steps", "6", "--eval_steps", "2",
             "--eval_dataset", f"{corpus}/*.jsonl.zst", "--eval_documents", "2", "--precision", "float32",
             "--display_samples", "2", "--output_dir", str(tmp_path / "run")]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, *flags], capture_output=True, text=True, timeout=200, env=environment(), cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    said = done.stderr
    assert "Traceback" not in said and "Tried to allocate" not in said
    assert "warning  this run needs about" in said and "or a smaller --model" in said
    assert said.count("out of memory for scores on held-out documents") == 1
    assert "not measured  evaluation 3 times, for lack of memory" in said
    assert "failed: out of memory" in said
    assert "the passport of step 0 failed (out of memory); training goes on" in said
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {sample["error"] for sample in samples} == {"out of memory"}
    assert len(read_ledger(tmp_path / "run")) == 6
