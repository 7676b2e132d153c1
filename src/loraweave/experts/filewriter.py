"""Experts of pipelines to single LoRA files, which diffusers' ``load_lora_weights`` reads."""

from __future__ import annotations

from pathlib import Path

from loraweave.errors import LoraweaveError
from loraweave.experts.types import Expert
from loraweave.files import atomic_path


def write_lora_file(expert: Expert, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write an expert whose modules stand in a pipeline (``unet.…``, ``text_encoder.…``) as one safetensors file.

    Scales other than 1 are multiplied into ``A``, since the file has no configuration.

    Returns:
        The file.

    Raises:
        LoraweaveError: the file exists (unless ``overwrite``), is no ``.safetensors``, a module stands in no pipeline,
            or it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = check_file(path, overwrite)
    tensors = {}
    for module, f in expert.factors.items():
        if not module.startswith(("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "text_encoder_3.")):
            raise LoraweaveError(
                f"expert module {module!r}: expected a pipeline's, such as 'unet.…'; other experts are written as "
                "folders by lw.write_expert"
            )
        A = f.A if f.scale == 1 else (f.scale * f.A.double()).to(f.A.dtype)
        B = f.B[:, :, None, None] if f.A.ndim == 4 else f.B
        for side, tensor in (("A", A), ("B", B)):
            tensors[f"{module}.lora_{side}.weight"] = tensor.detach().cpu().contiguous().clone()
    try:
        with atomic_path(path) as place:
            save_file(tensors, str(place), metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise LoraweaveError(f"{path}: cannot be written ({error})") from error
    return path


def check_file(path: str | Path, overwrite: bool = False) -> Path:
    """The path, if a safetensors file may be written there.

    Raises:
        LoraweaveError: it exists and is not to be overwritten, or does not end in ``.safetensors``.
    """
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise LoraweaveError(f"{path}: expected a name that ends in .safetensors")
    if path.exists() and not overwrite:
        raise LoraweaveError(f"{path}: exists; choose another name, or pass overwrite=True (--overwrite) to replace it")
    return path
