"""Trains and evaluates gates on a base that accelerate shards with FSDP2, or alone. Run by test_fsdp_trainer.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import lessons
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import save_file
from torch import Tensor
from transformers import Trainer

import loraweave as lw
import tiny
from loraweave.cli.processes import part
from loraweave.mixture import Mixture

create = Trainer.create_accelerator_and_postprocess


def create_with_fsdp(trainer: Trainer) -> None:
    """accelerate takes FSDP up on accelerators only; this does on gloo what it does there."""
    create(trainer)
    state = trainer.accelerator.state
    if state.use_distributed:
        state.fsdp_plugin = FullyShardedDataParallelPlugin()  # as the launcher's environment says
        state.distributed_type = DistributedType.FSDP
        trainer.is_fsdp_enabled = True


def logged(history: list[dict[str, float]]) -> Tensor:
    return torch.tensor([entry["loss"] for entry in history if "loss" in entry])


def expect_shared_out(mixture: Mixture, world: int) -> None:
    if world > 1:
        base = next(iter(mixture.layers.values())).base.weight
        assert base.to_local().shape[0] * world == base.shape[0], "the base is shared out"


def train(out: Path, world: int, rank: int) -> None:
    backend = "gloo" if world > 1 else None
    mixture = lessons.mixture("llama")
    if rank:  # all start from the first process's gates
        tiny.randomize(mixture)
    rows = lessons.lesson("llama", 24)
    arguments = lessons.arguments(
        out,
        max_steps=4,
        per_device_train_batch_size=4 // world,
        per_device_eval_batch_size=4 // world,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=2,
        ddp_backend=backend,
    )
    trainer = lw.GateTrainer(mixture, arguments, balance=0.0, train_dataset=rows[:16], eval_dataset=rows[16:])
    made = {"before": torch.tensor(trainer.evaluate()["eval_loss"])}
    expect_shared_out(mixture, world)
    trainer.train()
    made |= {"losses": logged(trainer.state.log_history), **lessons.gates(mixture)}
    made["after"] = torch.tensor(trainer.evaluate()["eval_loss"])
    with torch.no_grad():  # resumed half-way, it ends in the same place
        for _, parameter in mixture.gate_parameters():
            parameter.zero_()
    trainer.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    resumed = lessons.gates(mixture)

    mixture = lessons.mixture("llama")
    data = [{"input": f"{a} and {b}", "target": b} for a in "abcd" for b in ("xy", "zz", "k9")]
    result = lw.train(
        mixture,
        data,
        steps=3,
        batch_size=4 // world,
        balance=0.0,
        tokenizer=tiny.tokenizer(False),
        progress=False,
        use_cpu=True,
        ddp_backend=backend,
    )
    expect_shared_out(mixture, world)
    made |= {f"train {name}": gate for name, gate in lessons.gates(mixture).items()}
    made |= {"train losses": logged(result.history)}
    save_file(made, out / f"rank{rank}.safetensors")
    save_file(resumed, out / f"resumed{rank}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    Trainer.create_accelerator_and_postprocess = create_with_fsdp
    train(Path(sys.argv[1]), int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0)))
    part()
