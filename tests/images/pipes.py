"""Tiny random pipelines, LoRA files for them, and the slow ways that mixtures must equal. Nothing is downloaded."""

from __future__ import annotations

import copy
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

logging.set_verbosity_error()
logging.disable_progress_bar()
NAMES = ("hero", "coat", "ink")
KINDS = ("sd15", "sdxl", "sd3", "flux")
PROMPT = "hero in a coat"
SIZE = 16
CALL = {"height": SIZE, "width": SIZE, "num_inference_steps": 2, "output_type": "latent"}


def clip_tokenizer() -> CLIPTokenizer:
    letters = string.ascii_lowercase
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return CLIPTokenizer(vocab={word: n for n, word in enumerate(words)}, merges=[], model_max_length=12)


def clip(projection: bool, width: int = 16, **options: Any) -> nn.Module:
    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=24, num_attention_heads=2, num_hidden_layers=2, vocab_size=54,
        max_position_embeddings=12, bos_token_id=0, eos_token_id=1, pad_token_id=1, projection_dim=width, **options,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {letter: n + 3 for n, letter in enumerate(string.ascii_lowercase)}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", model_max_length=12)


def vae(channels: int = 4) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 8), norm_num_groups=2, layers_per_block=1, sample_size=SIZE, latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def unet(width: int, **options: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width, **options,
    )  # fmt: skip


def make(kind: str) -> Any:
    """A pipeline with random weights, always the same ones."""
    torch.manual_seed(0)
    if kind == "sd15":
        pipe = StableDiffusionPipeline(
            unet=unet(16), vae=vae(), text_encoder=clip(False), tokenizer=clip_tokenizer(), scheduler=DDIMScheduler(),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    elif kind == "sd2":  # OpenCLIP's text encoder, linear projections, velocities
        pipe = StableDiffusionPipeline(
            unet=unet(24, use_linear_projection=True), vae=vae(), text_encoder=clip(False, 24, hidden_act="gelu"),
            tokenizer=clip_tokenizer(), scheduler=DDIMScheduler(prediction_type="v_prediction"), safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    elif kind == "sdxl":
        inner = unet(
            32, addition_embed_type="text_time", addition_time_embed_dim=4, transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=4 * 6 + 16, use_linear_projection=True,
        )  # fmt: skip
        pipe = StableDiffusionXLPipeline(
            unet=inner, vae=vae(), text_encoder=clip(False), text_encoder_2=clip(True), tokenizer=clip_tokenizer(),
            tokenizer_2=clip_tokenizer(), scheduler=EulerDiscreteScheduler(), add_watermarker=False,
        )  # fmt: skip
    elif kind == "sd3":
        transformer = SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, out_channels=4,
        )  # fmt: skip
        pipe = StableDiffusion3Pipeline(
            transformer=transformer, vae=vae(), text_encoder=clip(True), text_encoder_2=clip(True), text_encoder_3=None,
            tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer(), tokenizer_3=None,
            scheduler=FlowMatchEulerDiscreteScheduler(),
        )  # fmt: skip
    else:
        transformer = FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(2, 2, 4),
        )  # fmt: skip
        t5 = T5Config(vocab_size=30, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
        pipe = FluxPipeline(
            transformer=transformer, vae=vae(), text_encoder=clip(False), text_encoder_2=T5EncoderModel(t5),
            tokenizer=clip_tokenizer(), tokenizer_2=t5_tokenizer(), scheduler=FlowMatchEulerDiscreteScheduler(),
        )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval().double()  # so that differences of rounding do not grow from step to step
            for parameter in part.parameters():  # large enough for every part to show in the picture
                if parameter.ndim > 1:
                    parameter.data.normal_(std=1.3 / parameter[0].numel() ** 0.5, generator=generator)
    return pipe


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "q_proj", "v_proj", "out_proj")
OTHERS = ("ff.net.0.proj", "ff.net.2", "proj_in", "proj_mlp", "fc1")
CONVS = ("conv1", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv")


def targets(pipe: Any, endings: Sequence[str]) -> dict[str, nn.Module]:
    """Path in the pipeline -> module."""
    return {
        f"{name}.{path}": module
        for name, part in pipe.components.items()
        if name in ("unet", "transformer")
        or (name.startswith("text_encoder") and type(part).__name__ != "T5EncoderModel")
        if isinstance(part, nn.Module)
        for path, module in part.named_modules()
        if path.endswith(tuple(f".{ending}" for ending in endings))
    }


def factors(modules: Mapping[str, nn.Module], seed: int, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Path -> random ``A`` and ``B``, with the shapes that peft gives them."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for path, module in modules.items():
        kernel = module.kernel_size if isinstance(module, nn.Conv2d) else ()
        into = module.in_channels if kernel else module.in_features
        out = module.out_channels if kernel else module.out_features
        a = torch.randn(rank, into, *kernel, generator=generator) / rank
        b = torch.randn(out, rank, *[1 for _ in kernel], generator=generator) * 0.5
        made[path] = (a, b)
    return made


def write(path: Path, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> Path:
    """A LoRA file as diffusers saves them."""
    sides = {
        f"{module}.lora_{side}.weight": t for module, ab in pairs.items() for side, t in zip("AB", ab, strict=True)
    }
    save_file({key: tensor.contiguous() for key, tensor in sides.items()}, path)
    return path


def files(pipe: Any, folder: Path, *, text: bool = True) -> dict[str, Path]:
    """Three LoRAs of different targets and ranks: name -> file."""
    made = {}
    for n, name in enumerate(NAMES):
        endings = ATTENTION + (OTHERS if n != 1 else ()) + (CONVS if n != 0 else ())
        chosen = {p: m for p, m in targets(pipe, endings).items() if text or not p.startswith("text_encoder")}
        made[name] = write(folder / f"{name}.safetensors", factors(chosen, n, rank=2 + n))
    return made


def loaded(pipe: Any, sources: Mapping[str, Path]) -> Any:
    """A copy of the pipeline with the LoRAs loaded by diffusers itself."""
    other = copy.deepcopy(pipe)
    for name, path in sources.items():
        other.load_lora_weights(path, adapter_name=name)
    for part in other.components.values():
        if isinstance(part, nn.Module):
            part.double()
    other.set_progress_bar_config(disable=True)
    return other


def latents(pipe: DiffusionPipeline, **options: Any) -> Tensor:
    """The picture's latents for a fixed seed."""
    call = {**CALL, "prompt": PROMPT, **options}
    if isinstance(pipe, FluxPipeline | StableDiffusion3Pipeline):
        call.setdefault("max_sequence_length", 12)
    generator = torch.Generator().manual_seed(call.pop("seed", 7))
    made: Tensor = pipe(**call, generator=generator).images
    return made


class Averaged(nn.Module):
    """A denoiser that is run once per adapter, one after the other, and averaged by hand."""

    def __init__(self, inner: nn.Module, names: Sequence[str], shares: Sequence[float]) -> None:
        super().__init__()
        self.inner, self.names, self.shares = inner, names, shares

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        total: Any = 0
        for name, share in zip(self.names, self.shares, strict=True):
            self.inner.set_adapters([name])
            total = total + share * self.inner(*args, **(kwargs | {"return_dict": False}))[0]
        return (total,)


def denoiser(pipe: Any) -> str:
    return "unet" if hasattr(pipe, "unet") else "transformer"


def start(rows: int = 1) -> Tensor:
    """Latents to start from."""
    return torch.randn(rows, 4, SIZE // 2, SIZE // 2, generator=torch.Generator().manual_seed(3)).double()


def by_hand(
    reference: Any, names: Sequence[str], shares: Callable[[int], Mapping[str, float]], steps: int, guidance: float
) -> Tensor:
    """The slow way: adapters swapped by hand, each with the prompt encoded under itself, and estimates averaged.

    Args:
        reference: a Stable Diffusion pipeline (1.5 or XL) with the adapters loaded by diffusers.
        names: the adapters.
        shares: number of the denoiser's evaluation, from 0 -> what each adapter's estimate counts; empty: bare model.
        steps: of the run.
        guidance: the scale; 1 for none.
    """
    told: dict[str, Any] = {}
    for name in [*names, ""]:
        choose(reference, name)
        told[name] = conditions(reference, guidance)
    scheduler = copy.deepcopy(reference.scheduler)
    scheduler.set_timesteps(steps)
    latent = start() * scheduler.init_noise_sigma
    for n, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(torch.cat([latent] * (2 if guidance > 1 else 1)), t)
        total: Any = 0
        for name, share in (shares(n) or {"": 1.0}).items():
            choose(reference, name)
            with torch.no_grad():
                noise = reference.unet(seen, t, **told[name]).sample
            if guidance > 1:
                without, with_prompt = noise.chunk(2)
                noise = without + guidance * (with_prompt - without)
            total = total + share * noise
        latent = scheduler.step(total, t, latent).prev_sample
    return latent


def choose(reference: Any, name: str) -> None:
    """Make one adapter the only one; no name: none."""
    if name:
        reference.enable_lora()
        reference.set_adapters([name])
    else:
        reference.disable_lora()


def conditions(reference: Any, guidance: float) -> dict[str, Any]:
    """What the denoiser is told of the prompt under the present adapter."""
    with torch.no_grad():
        found = reference.encode_prompt(
            PROMPT, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=guidance > 1
        )
    prompt, negative, *pooled = found
    said = {"encoder_hidden_states": torch.cat([negative, prompt]) if guidance > 1 else prompt}
    if pooled:
        text = torch.cat([pooled[1], pooled[0]]) if guidance > 1 else pooled[0]
        ids = torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]]).double().expand(len(text), -1)
        said["added_cond_kwargs"] = {"text_embeds": text, "time_ids": ids}
    return said
