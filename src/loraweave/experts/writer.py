"""Experts to ordinary PEFT folders, which peft and every tool that reads its files can load."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from loraweave.errors import LoraweaveError
from loraweave.experts.config import CONFIG_NAME
from loraweave.experts.sources import WEIGHTS_NAME
from loraweave.experts.types import Expert, LoraFactors


def write_expert(
    expert: Expert | Mapping[str, LoraFactors],
    folder: str | Path,
    *,
    base: str | None = None,
    task_type: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an expert as a PEFT folder: ``adapter_config.json`` and ``adapter_model.safetensors``.

    A new folder appears whole or not at all.

    Args:
        expert: an expert, or module path -> factors.
        folder: where to; must not exist or be empty, unless ``overwrite``.
        base: the base model to name in the configuration; by default the expert's own.
        task_type: peft's, e.g. ``"CAUSAL_LM"`` or ``"SEQ_2_SEQ_LM"``.
        overwrite: replace these two files in a folder that is in use; its other files stay.

    Returns:
        The folder.

    Raises:
        LoraweaveError: there is nothing to write, the folder is in use, or it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    factors = expert.factors if isinstance(expert, Expert) else expert
    if base is None and isinstance(expert, Expert):
        base = expert.base
    folder = Path(folder).expanduser()
    _check_factors(factors, folder)
    in_use = check_folder(folder, overwrite)

    partial = folder.parent / f".{folder.name}-{secrets.token_hex(4)}"
    tensors = {}
    for module, factor in factors.items():
        names = ("lora_embedding_A", "lora_embedding_B") if factor.embedding else ("lora_A.weight", "lora_B.weight")
        for name, tensor in zip(names, (factor.A, factor.B), strict=True):
            # safetensors refuses views and tensors that share memory
            stored = tensor[:, :, None, None] if factor.A.ndim == 4 and tensor.ndim == 2 else tensor
            tensors[f"base_model.model.{module}.{name}"] = stored.detach().cpu().contiguous().clone()
    config = json.dumps(peft_config(factors, base=base, task_type=task_type), indent=2)
    try:
        partial.mkdir(parents=True)
        save_file(tensors, str(partial / WEIGHTS_NAME), metadata={"format": "pt"})
        (partial / CONFIG_NAME).write_text(config + "\n", encoding="utf-8")
        # the safetensors library makes its files private; an expert is as public as its configuration
        (partial / WEIGHTS_NAME).chmod((partial / CONFIG_NAME).stat().st_mode)
        if in_use:
            for name in (WEIGHTS_NAME, CONFIG_NAME):
                os.replace(partial / name, folder / name)
        else:
            if folder.is_dir():
                folder.rmdir()
            partial.rename(folder)
    except (OSError, SafetensorError) as error:
        raise LoraweaveError(f"{folder}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def check_folder(folder: str | Path, overwrite: bool = False) -> bool:
    """Raise now what :func:`write_expert` would raise later; returns whether the folder holds something.

    Raises:
        LoraweaveError: it is a file, or in use and not to be overwritten.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise LoraweaveError(f"{folder}: is a file; expected a folder to write the expert to")
    in_use = folder.is_dir() and any(folder.iterdir())
    if in_use and not overwrite:
        raise LoraweaveError(
            f"{folder}: is not empty; choose another folder, or pass overwrite=True (--overwrite) to replace "
            "the LoRA in it"
        )
    return in_use


def peft_config(
    factors: Mapping[str, LoraFactors], *, base: str | None = None, task_type: str | None = None
) -> dict[str, object]:
    """The content of ``adapter_config.json`` for these factors.

    ``r`` and ``lora_alpha`` are the commonest; modules that differ stand in ``rank_pattern`` and ``alpha_pattern``,
    whose keys peft matches as regular expressions against the end of a module's path: hence ``^`` and the escapes.
    """
    ranks = {module: factor.rank for module, factor in factors.items()}
    alphas = {module: _alpha(factor.scale, factor.rank) for module, factor in factors.items()}
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "target_modules": list(factors),
        "rank_pattern": {f"^{re.escape(module)}": value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{re.escape(module)}": value for module, value in alphas.items() if value != alpha},
    }


def _alpha(scale: float, rank: int) -> int | float:
    """The alpha with ``alpha / rank == scale``, whole where possible."""
    alpha = scale * rank
    return round(alpha) if round(alpha) / rank == scale else alpha


def _check_factors(factors: Mapping[str, LoraFactors], folder: Path) -> None:
    if not factors:
        raise LoraweaveError(f"{folder}: the expert has no LoRA in any module; there is nothing to write")
    for module, factor in factors.items():
        if factor.A.ndim not in (2, 4) or factor.B.ndim != 2 or factor.A.shape[0] != factor.B.shape[1]:
            raise LoraweaveError(
                f"expert module {module!r}: factors {list(factor.A.shape)} and {list(factor.B.shape)} do not fit; "
                "expected [rank, in] and [out, rank]"
            )
        if not math.isfinite(factor.scale):
            raise LoraweaveError(f"expert module {module!r}: scale is {factor.scale}; expected a finite number")
