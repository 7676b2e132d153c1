"""``GateTrainer``: what it optimises, logs and keeps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lessons
import pytest
import torch
from torch.testing import assert_close
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback

import loraweave as lw
import tiny
from loraweave.training import objective
from loraweave.training.trainer import gate_statistics


def trainer(mixture: Any, folder: Path, rows: Any, balance: float | None = None, **options: Any) -> lw.GateTrainer:
    made = lw.GateTrainer(mixture, lessons.arguments(folder, **options), balance=balance, train_dataset=rows)
    made.remove_callback(PrinterCallback)
    return made


@pytest.mark.parametrize("architecture", lessons.ARCHITECTURES)
def test_gates_learn_and_nothing_else_moves(architecture: str, tmp_path: Path) -> None:
    mixture = lessons.mixture(architecture, lw.MoLE(scale=1.0))
    trainable = {id(p) for _, p in mixture.gate_parameters() if p.requires_grad}
    gates = {id(p) for _, p in mixture.gate_parameters()}
    others = [t for t in (*mixture.model.parameters(), *mixture.model.buffers()) if id(t) not in gates]
    before = [t.clone() for t in others]
    rows = lessons.lesson(architecture)
    run = trainer(mixture, tmp_path, rows, 0.0, max_steps=40, logging_steps=5)
    assert isinstance(run, Trainer)
    run.train()
    log = [entry for entry in run.state.log_history if "task_loss" in entry]
    assert log[-1]["task_loss"] < log[0]["task_loss"] - 0.1
    if architecture == "llama":
        assert log[-1]["load/ant"] > max(log[-1]["load/bee"], log[-1]["load/cat"], 0.4), "whom the answers come from"
    assert {id(p) for group in run.optimizer.param_groups for p in group["params"]} == trainable
    assert all(torch.equal(t, copy) for t, copy in zip(others, before, strict=True))
    assert not any(p.requires_grad for p in mixture.model.parameters() if id(p) not in trainable)


def test_the_log(tmp_path: Path) -> None:
    mixture = lessons.mixture("t5")
    run = trainer(mixture, tmp_path, lessons.lesson("t5"), 0.5, max_steps=2, learning_rate=1e-9)
    run.train()
    first = run.state.log_history[0]
    sites = [site.name for site in mixture.sites]
    assert {f"entropy/{name}" for name in sites} <= first.keys()
    assert {f"load/{name}" for name in tiny.NAMES} <= first.keys()
    assert first["entropy"] == pytest.approx(math.log(3), abs=1e-4)
    assert first["load/bee"] == pytest.approx(1 / 3, abs=1e-4)
    assert first["balance_loss"] == pytest.approx(3 * math.log(3), abs=1e-4)
    assert first["loss"] == pytest.approx(first["task_loss"] + 0.5 * first["balance_loss"], abs=1e-3)


@pytest.mark.parametrize("architecture", lessons.ARCHITECTURES)
def test_entropy_and_load_are_those_of_the_last_pass(architecture: str) -> None:
    mixture = tiny.randomize(lessons.mixture(architecture))
    inputs = tiny.batch(architecture)
    with mixture.record() as seen:
        tiny.logits(mixture.model, inputs)
    said = gate_statistics(mixture)
    mask = inputs["attention_mask"].bool()
    entropies, loads = {}, []
    for name, g in seen.weights.items():
        p = g / g.sum(-1, keepdim=True)
        p = p[mask] if p.shape[:2] == mask.shape else p.flatten(0, 1)
        entropies[name] = float(-(p * p.log()).sum(-1).mean())
        loads.append(p.mean(0))
        assert said[f"entropy/{name}"] == pytest.approx(entropies[name], abs=1e-4)
    assert said["entropy"] == pytest.approx(sum(entropies.values()) / len(entropies), abs=1e-4)
    mean = torch.stack(loads).mean(0)
    for expert, load in zip(tiny.NAMES, mean, strict=True):
        assert said[f"load/{expert}"] == pytest.approx(float(load), abs=1e-4)
    assert float(objective.balance(mixture.sites)) == pytest.approx(float(-mean.log().sum()), abs=1e-4)


def test_balance_keeps_experts_in_use(tmp_path: Path) -> None:
    loads = []
    for balance in (0.0, 2.0):
        mixture = lessons.mixture("llama", lw.MoLE(scale=1.0))
        run = trainer(mixture, tmp_path, lessons.lesson("llama"), balance, max_steps=25)
        run.train()
        loads.append(run.state.log_history[-2]["load/ant"])
    assert loads[0] > 0.45 > loads[1]
    mixture = lessons.mixture("llama", lw.MoLE(balance=0.3))
    assert trainer(mixture, tmp_path, []).balance == 0.3, "by default what the policy says"


def manual_step(architecture: str, batches: list[Any], alpha: float, weights: list[float]) -> dict[str, torch.Tensor]:
    """Parameters after one plain gradient step on ``sum w_b task_b + alpha * mean balance_b``."""
    mixture = tiny.randomize(lessons.mixture(architecture))
    for rows, weight in zip(batches, weights, strict=True):
        columns = {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
        task = mixture.model(**columns).loss
        balance = objective.balance([s for s in mixture.sites if s.gate is not None])
        (weight * task + alpha * balance / len(batches)).backward()
    with torch.no_grad():
        for _, p in mixture.gate_parameters():
            if p.grad is not None:
                p.sub_(0.1 * p.grad)
    return lessons.gates(mixture)


@pytest.mark.parametrize("architecture", lessons.ARCHITECTURES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_one_step_against_the_equation(architecture: str, accumulate: int, tmp_path: Path) -> None:
    """Also under gradient accumulation the balance loss weighs alpha, and the task loss 1."""
    rows = lessons.lesson(architecture, 8)
    for row in rows[4:]:  # batches with unlike numbers of labels
        row["labels"] = [*row["labels"][:-1], -100]
    size = 8 // accumulate
    batches = [rows[start : start + size] for start in range(0, 8, size)]
    labels = [sum(label != -100 for row in batch for label in row["labels"]) for batch in batches]
    # Llama's loss is a mean over all labels of the step; T5's a mean per batch, averaged over batches.
    by_tokens, evenly = [n / sum(labels) for n in labels], [1 / accumulate] * accumulate
    expected = manual_step(architecture, batches, 0.7, by_tokens if architecture == "llama" else evenly)
    mixture = tiny.randomize(lessons.mixture(architecture))
    run = trainer(
        mixture,
        tmp_path,
        rows,
        0.7,
        max_steps=1,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0.0,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulate,
        train_sampling_strategy="sequential",
    )
    run.train()
    for name, p in lessons.gates(mixture).items():
        assert_close(p, expected[name], atol=2e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_the_answer_stays_hidden_under_label_smoothing(tmp_path: Path) -> None:
    """The trainer takes the labels out of the inputs then; the gate must still know what the prompt is."""
    mixture = tiny.randomize(lessons.mixture("llama", lw.MoLE(pooling="prompt")))
    run = trainer(mixture, tmp_path, lessons.lesson("llama"), label_smoothing_factor=0.1)
    seen = []
    for answer in (5, 9):
        row = lessons.lesson("llama", 2)
        inputs = {key: torch.tensor([r[key] for r in row]) for key in row[0]}
        inputs["input_ids"][:, 6:] = answer
        inputs["labels"][:, 6:] = answer
        with mixture.record() as log, torch.no_grad():
            run.compute_loss(mixture.model, inputs)
        seen.append(log.weights)
    assert all(torch.allclose(g, seen[1][name], atol=1e-6) for name, g in seen[0].items())


@pytest.mark.parametrize("options", [{"bf16": True}, {"activation_checkpointing": True}, {"torch_compile": False}])
def test_arguments_of_the_trainer(options: dict[str, Any], tmp_path: Path) -> None:
    mixture = lessons.mixture("llama")
    run = trainer(mixture, tmp_path, lessons.lesson("llama"), max_steps=2, **options)
    run.train()
    assert all(math.isfinite(entry["loss"]) for entry in run.state.log_history if "loss" in entry)
    assert any(p.any() for name, p in mixture.gate_parameters() if name.endswith("/e"))


def test_evaluation_and_the_best_gates(tmp_path: Path) -> None:
    mixture = lessons.mixture("llama")
    rows = lessons.lesson("llama", 8)
    made = lw.GateTrainer(
        mixture,
        lessons.arguments(
            tmp_path,
            max_steps=6,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            load_best_model_at_end=True,
            learning_rate=5.0,  # soon worse than at the start
        ),
        train_dataset=rows,
        eval_dataset=rows,
    )
    made.remove_callback(PrinterCallback)
    made.train()
    losses = {e["step"]: e["eval_loss"] for e in made.state.log_history if "eval_loss" in e}
    best = min(losses, key=losses.__getitem__)
    assert made.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert made.evaluate()["eval_loss"] == pytest.approx(losses[best], abs=1e-5)


def test_a_quantised_base_can_be_trained_on(tmp_path: Path) -> None:
    """The trainer refuses quantised models without adapters; gates over frozen experts are such adapters."""
    mixture = lessons.mixture("llama")
    mixture.model.is_quantized = True
    run = trainer(mixture, tmp_path, lessons.lesson("llama"), max_steps=1)
    run.train()


def test_masked_training(tmp_path: Path) -> None:
    mixture = lessons.mixture("llama")
    with mixture.only("ant", "bee"):
        run = trainer(mixture, tmp_path, lessons.lesson("llama"), 0.5, max_steps=2)
        run.train()
    assert all(torch.isfinite(p).all() for _, p in mixture.gate_parameters())
    assert run.state.log_history[0]["load/cat"] == 0.0


def test_layer_dropout(tmp_path: Path) -> None:
    host = tiny.model("bart", encoder_layerdrop=0.6)
    mixture = lw.attach(host, tiny.experts(host, "bart"), lw.MoLE())
    rows = [{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [8, 9]} for _ in range(4)]
    trainer(mixture, tmp_path, rows, 0.5, max_steps=6, per_device_train_batch_size=2).train()


def test_what_cannot_be_trained(tmp_path: Path) -> None:
    mixture = lessons.mixture("llama", lw.Linear())
    with pytest.raises(
        lw.LoraweaveError, match="nothing to train: a 'linear' policy has no gates that learn; use MoLE"
    ):
        trainer(mixture, tmp_path, [])
    mixture.policy = lw.MoLE()
    kwargs = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(lw.LoraweaveError, match="use_reentrant"):
        trainer(mixture, tmp_path, [], **kwargs)
