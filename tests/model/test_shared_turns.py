"""Updates of Muon that several processes share out: the same as those of one."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from slimpajama_hf.model import presets, shared_turns
from slimpajama_hf.model.optimization import AdamWWithMuon, hidden_matrices
from slimpajama_hf.samples.tokenizer import load_tokenizer
from tests.conftest import ROOT, environment

STEPS = 40


def model() -> torch.nn.Module:
    # 20 rows: over 3 processes they do not come out even.
    return presets.build(presets.model_config("tiny", "n_layer=2,n_embd=20,n_head=2", load_tokenizer("builtin"), 32), 1)


def trained(network: torch.nn.Module, processes: int, sharded: bool) -> torch.nn.Module:
    """After some steps of gradients that are the same however many processes there are."""
    if sharded:
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import distribute_tensor

        for block in network.transformer.h:
            fully_shard(block)
        fully_shard(network)
    groups = [{"params": list(network.parameters()), "weight_decay": 0.1}]
    optimizer = AdamWWithMuon.of(
        torch.optim.AdamW(groups, lr=1e-2, fused=True), network, 0.5, torch.bfloat16, documents=8, processes=processes,
        by_row=True,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        for parameter in network.parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            if sharded:
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient
        optimizer.step()
    return network


def main(rank: int, world_size: int, kind: str, path: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}.store", rank=rank, world_size=world_size)
    network = trained(model(), world_size, kind == "sharded")
    found = {
        name: getattr(parameter, "full_tensor", lambda own=parameter: own)().detach()
        for name, parameter in network.named_parameters()
    }
    torch.save(found, f"{path}.{rank}")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize(("kind", "world_size"), [("copies", 2), pytest.param("sharded", 3, marks=pytest.mark.slow)])
@pytest.mark.long
def test_processes_make_together_the_updates_that_one_makes(tmp_path, kind, world_size):
    command = [sys.executable, "-m", "tests.model.test_shared_turns"]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(world_size), kind, str(tmp_path / "found")], cwd=ROOT, env=environment()
        )
        for rank in range(world_size)
    ]
    assert [process.wait(100) for process in started] == [0] * world_size
    begun = dict(model().named_parameters())
    alone = dict(trained(model(), 1, False).named_parameters())
    assert len(hidden_matrices(model())) == 8
    for rank in range(world_size):
        found = torch.load(tmp_path / f"found.{rank}")
        for name, parameter in alone.items():
            assert not torch.equal(parameter, begun[name])
            if kind == "copies":
                assert torch.equal(found[name], parameter), name
            else:
                torch.testing.assert_close(found[name], parameter.detach(), rtol=1e-5, atol=1e-6)


def test_the_costliest_are_dealt_out_first_and_all_alike():
    wide, square = torch.Size([768, 3072]), torch.Size([768, 768])
    assert shared_turns.owners([square] * 3 + [wide], 2) == [1, 1, 1, 0]
    assert shared_turns.owners([wide] * 8, 4).count(3) == 2
    assert shared_turns.owners([square], 1024) == [0]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
