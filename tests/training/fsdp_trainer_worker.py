"""Trains gates with ``GateTrainer`` under accelerate's FSDP2, or alone. Run by test_fsdp_trainer.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import lessons
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import save_file

import loraweave as lw


class Trainer(lw.GateTrainer):
    """accelerate takes FSDP up on accelerators only; this does on gloo what it does there."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp:
            state = self.accelerator.state
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            state.distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True


if __name__ == "__main__":
    torch.set_num_threads(1)
    out, world = Path(sys.argv[1]), int(os.environ.get("WORLD_SIZE", 1))
    mixture = lessons.mixture("llama")
    arguments = lessons.arguments(
        out,
        max_steps=4,
        per_device_train_batch_size=4 // world,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=2,
        fsdp=world > 1,
        fsdp_config={"version": 2} if world > 1 else None,
        ddp_backend="gloo" if world > 1 else None,
    )
    trainer = Trainer(mixture, arguments, balance=0.0, train_dataset=lessons.lesson("llama", 16))
    trainer.train()
    if world > 1:
        base = next(iter(mixture.layers.values())).base.weight
        assert base.to_local().shape[0] * world == base.shape[0], "the base is shared out"
    save_file(lessons.gates(mixture), out / f"rank{arguments.process_index}.safetensors")
    with torch.no_grad():  # resumed half-way, it ends in the same place
        for _, parameter in mixture.gate_parameters():
            parameter.zero_()
    trainer.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    save_file(lessons.gates(mixture), out / f"resumed{arguments.process_index}.safetensors")
