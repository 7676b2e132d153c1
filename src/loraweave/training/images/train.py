"""``train_images``: gates over a pipeline's LoRAs, learned in one call."""

from __future__ import annotations

import hashlib
import random
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from loraweave.errors import LoraweaveError, TriggerWarning, unknown
from loraweave.experts.triggers import warn_of_triggers
from loraweave.files import atomic_path, make_folder
from loraweave.integrations import diffusers_training as runs
from loraweave.mixing.numerics import balance_loss
from loraweave.mixture import Mixture
from loraweave.training import objective as gates
from loraweave.training.images import checkpoints
from loraweave.training.images.objectives import ClipGuidance, Denoising, Draw, Lesson
from loraweave.training.interrupts import undivided
from loraweave.training.sharded import average_gradients
from loraweave.training.standards import MEASURED_BATCHES, measure
from loraweave.training.train import TrainingResult, default_learning_rate

SAMPLES = "samples"
_SHOWN = 4


def train_images(
    mixture: Mixture,
    data: Any,
    objective: ClipGuidance | Denoising,
    *,
    steps: int = 100,
    learning_rate: float | None = None,
    batch_size: int = 1,
    balance: float | None = None,
    warmup_steps: int | None = None,
    seed: int = 0,
    output_dir: str | Path | None = None,
    resume: bool = False,
    save_every: int | None = None,
    sample_every: int | None = None,
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None,
    gradient_checkpointing: bool = True,
    progress: bool | str = True,
) -> TrainingResult:
    """Train the gates of a mixture over a diffusers pipeline; the experts and the pipeline stay as they are.

    Runs on accelerate: start it by ``accelerate launch`` or ``torchrun`` for several processes, which share what one
    process with the whole batch would do. All that is drawn depends on ``seed``, step and row alone, so a run that goes
    on from a checkpoint ends where an uninterrupted one does.

    Args:
        mixture: attached to a pipeline, with a policy that learns (``MoLE``).
        data: for :class:`ClipGuidance` prompts, or pairs of a prompt and the names of the experts that it is about (the
            others are masked meanwhile, as they will be when it is painted); for :class:`Denoising` prompt -> folder of
            pictures, or pairs of picture and prompt.
        objective: what the gates are taught by.
        steps: optimiser steps.
        learning_rate: at its highest; a short warm-up, then linear to zero. Default: what suits the gates' width.
        batch_size: pictures per step and process.
        balance: weight of the balance loss; default: the policy's.
        warmup_steps: default: a twentieth of ``steps``.
        seed: of everything that is drawn.
        output_dir: where checkpoints and samples go; none are kept by default.
        resume: go on from the last checkpoint in ``output_dir``, if there is one.
        save_every: steps between checkpoints; default: a quarter of ``steps``. An interruption (Ctrl-C) writes one too.
        sample_every: steps between sample pictures of the first prompts; none by default.
        mixed_precision: as accelerate takes it; default: what accelerate is configured to.
        gradient_checkpointing: compute denoiser and decoder again instead of keeping what they computed.
        progress: show a progress bar; a text stands before it.

    Raises:
        LoraweaveError: nothing to train, bad data or options, a pipeline that is not supported, or a checkpoint of
            another run.
    """
    from accelerate.utils import parse_flag_from_env

    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise LoraweaveError("train_images: expected one process or DDP, got FSDP; launch it without fsdp_config")
    pipe = _checked(mixture, steps=steps, batch_size=batch_size, save_every=save_every, sample_every=sample_every)
    if learning_rate is not None and not learning_rate > 0:
        raise LoraweaveError(f"learning_rate: expected a number above 0, got {learning_rate}")
    if output_dir is None and (resume or sample_every is not None):
        raise LoraweaveError("output_dir: resume and sample_every need a folder; give one")
    folder = None if output_dir is None else make_folder(output_dir)
    weight = float(getattr(mixture.policy, "balance", 0.0) if balance is None else balance)
    rate = learning_rate or default_learning_rate(mixture)
    warmup = max(1, steps // 20) if warmup_steps is None else warmup_steps
    learned = [p for _, p in mixture.gate_parameters() if p.requires_grad]
    started = time.perf_counter()
    with ExitStack() as stack:
        accelerator = _accelerator(mixed_precision, pipe)
        stack.enter_context(runs.prepared(pipe, gradient_checkpointing))
        if accelerator.device.type != "cpu":
            pipe.to(accelerator.device)
        lesson = objective.lesson(mixture, data, accelerator.device)
        _check_masks(mixture, lesson)
        warn_of_triggers(mixture.sources, lesson.prompts, stacklevel=3)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", TriggerWarning)  # said once, of all prompts together
        optimizer = torch.optim.AdamW(learned, lr=rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _slope(warmup, steps))
        prepared = accelerator.prepare(optimizer)
        rows = batch_size * accelerator.num_processes
        settings: dict[str, Any] = {"steps": steps, "rows": rows, "seed": seed, "learning_rate": rate}
        settings |= {"balance": weight, "warmup_steps": warmup, **checkpoints.described(objective)}
        settings |= {"prompts": _fingerprint(lesson), **checkpoints.attached(mixture)}
        done = checkpoints.Progress(0, [], 0.0, settings)
        found = checkpoints.read(folder, mixture, settings) if resume and folder is not None else None
        if found is not None:
            state, done = found
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            if accelerator.scaler is not None and state["scaler"]:
                accelerator.scaler.load_state_dict(state["scaler"])
        else:

            def look() -> None:
                for step in range(MEASURED_BATCHES):
                    draws = list(draws_of(seed, step, rows, len(lesson.prompts)))
                    mine = draws[accelerator.process_index * batch_size :][:batch_size]
                    for names, part in _parts(lesson, mine).items():
                        with _at_work(mixture, names), accelerator.autocast():
                            lesson.loss(part)

            measure(mixture, look, accelerator)
        begun, total, earlier = done.step, 0.0, done.seconds
        bar = stack.enter_context(
            tqdm(
                total=steps,
                initial=done.step,
                desc=progress if isinstance(progress, str) else "training gates",
                unit="step",
                disable=not (progress and accelerator.is_main_process),
            )
        )

        def save() -> None:
            if folder is not None and accelerator.is_main_process:
                done.seconds = earlier + time.perf_counter() - started
                scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else {}
                states = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "scaler": scaler}
                checkpoints.write(folder, mixture, states, done)

        log_every, save_every = max(1, steps // 20), save_every or max(1, steps // 4)
        try:
            while done.step < steps:
                draws = list(draws_of(seed, done.step, rows, len(lesson.prompts)))
                mine = draws[accelerator.process_index * batch_size :][:batch_size]
                loss, told = _teach(mixture, lesson, draws, mine, weight, accelerator)
                if not torch.isfinite(loss):
                    raise LoraweaveError(
                        f"training: the loss at step {done.step + 1} is not finite; lower the learning rate, or train "
                        "in bf16 or full precision"
                    )
                if accelerator.num_processes > 1:
                    average_gradients(accelerator, learned)
                norm = accelerator.clip_grad_norm_(learned, 1.0)
                told["gradient"] = float(norm) if norm is not None else 0.0
                with undivided():
                    prepared.step()
                    schedule.step()
                    optimizer.zero_grad()
                    done.step, done.total = done.step + 1, done.total + told["task_loss"]
                    if done.step % log_every == 0 or done.step == steps:
                        done.history.append({"step": float(done.step), **told})
                total += told["task_loss"]
                bar.update()
                bar.set_postfix(loss=f"{told['task_loss']:.3f}", entropy=f"{told['entropy']:.2f}", refresh=False)
                if done.step % save_every == 0 or done.step == steps:
                    save()
                if sample_every is not None and (done.step % sample_every == 0 or done.step == steps):
                    assert folder is not None
                    if accelerator.is_main_process:
                        _sample(mixture, lesson, objective, folder / SAMPLES / f"step-{done.step:06d}.png")
        except KeyboardInterrupt:
            if done.step > begun:
                with undivided():
                    save()
            raise
        accelerator.wait_for_everyone()
    return TrainingResult(
        steps=done.step,
        seconds=time.perf_counter() - started,
        loss=total / (done.step - begun) if done.step > begun else done.total / max(done.step, 1),
        history=done.history,
        earlier_seconds=earlier,
    )


def _checked(mixture: Mixture, **counts: int | None) -> Any:
    if mixture.pipeline is None:
        raise LoraweaveError("train_images: this mixture stands in no diffusers pipeline; use lw.train")
    for name, value in counts.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise LoraweaveError(f"{name}: expected a whole number of at least 1, got {value!r}")
    if not any(p.requires_grad for _, p in mixture.gate_parameters()):
        raise LoraweaveError(f"nothing to train: a {mixture.policy.name!r} policy has no gates that learn; use MoLE")
    if mixture.folded:
        raise LoraweaveError("cannot train gates that are folded into the weights; call unfold() first")
    runs.check_pipeline(mixture.pipeline)
    return mixture.pipeline


def _accelerator(mixed_precision: str | None, pipe: Any) -> Any:
    """Accelerate's own, with its complaints (another precision than earlier in this process, say) as ours."""
    from accelerate import Accelerator

    if mixed_precision not in (None, "no", "fp16", "bf16"):
        raise unknown("mixed_precision", str(mixed_precision), ["no", "fp16", "bf16"])
    try:
        return Accelerator(mixed_precision=mixed_precision, cpu=_stays_on_cpu(pipe))
    except ValueError as error:
        first = " ".join(str(error).split())
        raise LoraweaveError(f"mixed_precision {mixed_precision!r}: accelerate refuses it ({first})") from error


def _stays_on_cpu(pipe: Any) -> bool:
    return not torch.cuda.is_available() and pipe.device.type == "cpu"


def _slope(warmup: int, steps: int) -> Any:
    def at(step: int) -> float:
        return (step + 1) / (warmup + 1) if step < warmup else max(0.0, (steps - step) / max(1, steps - warmup))

    return at


def draws_of(seed: int, step: int, rows: int, items: int) -> Iterator[Draw]:
    """The rows of one step. The data goes round in a new order each time."""
    batch = random.Random(f"{seed} {step}").getrandbits(60)
    for n in range(step * rows, (step + 1) * rows):
        order = random.Random(f"{seed} order {n // items}").sample(range(items), items)
        yield Draw(random.Random(f"{seed} row {n}").getrandbits(60), batch, order[n % items])


def _check_masks(mixture: Mixture, lesson: Lesson) -> None:
    """Gates that share out a total give an expert left alone all of it, whatever they say."""
    alone = [
        p for p, names in zip(lesson.prompts, lesson.experts, strict=True) if names is not None and len(names) == 1
    ]
    if not alone or not getattr(mixture.policy, "normalized", False):
        return
    what = f"prompts: {alone[0]!r} is about one expert; under gates that share out a total there is nothing to learn"
    if len(alone) == len(lesson.prompts):
        raise LoraweaveError(f"{what}, and no prompt is about more; name several, or take activation 'sigmoid'")
    warnings.warn(f"{what} from it ({len(alone)} such of {len(lesson.prompts)})", stacklevel=4)


def _parts(lesson: Lesson, draws: Sequence[Draw]) -> dict[tuple[str, ...] | None, list[Draw]]:
    """The rows by the experts that are at work in them."""
    parts: dict[tuple[str, ...] | None, list[Draw]] = {}
    for draw in draws:
        parts.setdefault(lesson.experts[draw.item], []).append(draw)
    return parts


@contextmanager
def _at_work(mixture: Mixture, names: tuple[str, ...] | None) -> Iterator[None]:
    with nullcontext() if names is None else mixture.only(*names):
        yield


def _teach(
    mixture: Mixture, lesson: Lesson, draws: Sequence[Draw], mine: Sequence[Draw], weight: float, accelerator: Any
) -> tuple[Tensor, dict[str, float]]:
    """Forward and backward of this process's rows, ``mine`` of ``draws``: the loss of all rows, and what is logged.

    Rows with other experts at work go one after the other, each backward under its own mask: what gradient
    checkpointing computes again must find the mask that it was computed under.
    """
    whole = {name: torch.zeros((), device=accelerator.device) for name in ("loss", "task", "balance", "entropy")}
    whole["shares"] = torch.zeros(len(mixture.experts), device=accelerator.device)
    of_mine = _parts(lesson, mine)
    for names, everywhere in _parts(lesson, draws).items():
        part = of_mine.get(names, [])
        share = len(part) / len(mine)
        with _at_work(mixture, names):
            with accelerator.autocast():
                if not part:
                    _over_all(torch.zeros_like(whole["shares"]), 0.0, accelerator)
                    continue
                task, shares, entropy = _pass(mixture, lesson, part)
                shares = _over_all(shares, len(part) / len(everywhere), accelerator)
                balance = balance_loss(shares[[mixture.experts.index(name) for name in mixture.kept]])
                loss = task + weight * balance if weight else task
            accelerator.backward(share * loss)
        told = {"loss": loss, "task": task, "balance": balance, "entropy": entropy, "shares": shares}
        for name, value in told.items():
            whole[name] += share * value.detach().to(whole[name])
    if accelerator.num_processes > 1:
        whole = {name: accelerator.reduce(value, "mean") for name, value in whole.items()}
    logged = {"task_loss": whole["task"], "balance_loss": whole["balance"], "entropy": whole["entropy"]}
    logged |= {f"load/{name}": value for name, value in zip(mixture.experts, whole["shares"], strict=True)}
    return whole["loss"], dict(zip(logged, torch.stack([*logged.values()]).tolist(), strict=True))


def _pass(mixture: Mixture, lesson: Lesson, draws: Sequence[Draw]) -> tuple[Tensor, Tensor, Tensor]:
    """The task loss of some rows, each expert's mean share over all sites and rows, and the gates' mean entropy."""
    sites = [site for site in mixture.sites if site.gate is not None]
    for site in sites:
        site.clear()
    task = lesson.loss(draws)
    sites = [site for site in sites if site.current is not None]
    shares = gates.mean_shares(sites).to(task.device)
    with torch.no_grad():
        entropy = torch.stack([gates.entropy(site).to(task.device) for site in sites]).mean()
    return task, shares, entropy


def _over_all(shares: Tensor, part: float, accelerator: Any) -> Tensor:
    """Shares of the rows of all processes in value, of this one's in gradient: the mean of the gradients is then the
    whole batch's.

    Args:
        shares: ``[N]``, of this process's rows.
        part: which part of all rows these are.
        accelerator: of the processes, which all call this.
    """
    if accelerator.num_processes == 1:
        return shares
    whole: Tensor = accelerator.reduce(part * shares.detach(), "sum")
    return shares + (whole - shares.detach())


def _fingerprint(lesson: Lesson) -> str:
    """Of the prompts, and of the experts they are about where that is said."""
    about = [] if all(names is None for names in lesson.experts) else list(map(str, lesson.experts))
    return hashlib.sha256("\n".join([*lesson.prompts, *about]).encode()).hexdigest()[:12]


def _sample(mixture: Mixture, lesson: Lesson, objective: ClipGuidance | Denoising, path: Path) -> None:
    """Pictures of the first prompts, always from the same noise, beside each other."""
    from PIL import Image

    asked = list(dict.fromkeys(zip(lesson.prompts, lesson.experts, strict=True)))[:_SHOWN]
    call = {"num_inference_steps": getattr(objective, "steps", 20)} | dict(objective.call)
    guidance = getattr(objective, "guidance", None)
    call |= {} if guidance is None else {"guidance_scale": guidance}
    images = []
    for number, (prompt, names) in enumerate(asked):
        with _at_work(mixture, names):
            generator = torch.Generator().manual_seed(number)
            images += mixture.pipeline(prompt, generator=generator, **call).images[:1]
    sheet = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)))
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width
    with atomic_path(path) as place:
        sheet.save(place, format="PNG")
