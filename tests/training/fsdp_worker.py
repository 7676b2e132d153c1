"""Trains gates on a base that FSDP2 shards, or alone; writes losses and gates. Run by test_fsdp.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from safetensors.torch import save_file

import loraweave as lw
import tiny

STEPS, ROWS = 4, 4

if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    mixture = tiny.randomize(tiny.attached("llama", lw.MoLE()))
    model = mixture.model.train()
    gates = [p for _, p in mixture.gate_parameters() if p.requires_grad]
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (world,))
        whole = {p for _, p in mixture.gate_parameters()}
        for block in model.model.layers:
            fully_shard(block, mesh=mesh, ignored_params=whole)
        fully_shard(model, mesh=mesh, ignored_params=whole)
        local = next(iter(mixture.layers.values())).base.weight.to_local()
        assert local.shape[0] * world == tiny.WIDTH, "the base is shared out"
    optimizer = torch.optim.SGD(gates, lr=0.05)
    losses = []
    for step in range(STEPS):
        ids = tiny.batch("llama", (6,) * ROWS, seed=step)["input_ids"][rank::world]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        total = loss.detach().clone()
        for tensor in [total, *(p.grad for p in gates)] if world > 1 else []:
            dist.all_reduce(tensor)
            tensor /= world
        losses.append(total)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():  # evaluation, spread over the processes
        ids = tiny.batch("llama", (6,) * ROWS, seed=99)["input_ids"][rank::world]
        score = model.eval()(input_ids=ids, labels=ids).loss
    if world > 1:
        dist.all_reduce(score)
    made = {name.replace("/", ":"): p.detach().clone() for name, p in mixture.gate_parameters()}
    save_file(made | {"losses": torch.stack(losses), "score": score / world}, out / f"rank{rank}.safetensors")
    if world > 1:
        dist.destroy_process_group()
