"""The untrained parts of the bundled image pipeline: tokenizer, text encoder, denoiser, scheduler."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from loraweave.zoo.images.elements import BASE, HELD_OUT, STYLES

LENGTH = 48
"""Tokens of a prompt."""
WIDTH = 128
"""Width of the text encoder, and of cross attention."""
SPARE = (
    "a an the and in on with of at by picture person figure holding wearing standing near cloth thing mark ground "
    "sks ohwx zwx brak lomir tavin quor hesta nuvo rilk seff wundo yarro ixen opal plume"
)
"""Further words that are one token each, for LoRAs yet to come."""


def words() -> list[str]:
    """Every word that gets a token of its own."""
    texts = [e.words for e in (*BASE, *HELD_OUT.values())] + [*STYLES.values(), SPARE]
    return sorted({word for text in texts for word in re.findall(r"[a-z]+", text)})


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """Writes ``vocab.json`` and ``merges.txt`` in CLIP's format, in which every one of :func:`words` is one token, and
    gives the tokenizer read from them."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = [chr(c) for c in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=100_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False, initial_alphabet=alphabet
    )
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trained.train_from_iterator(words(), trainer)
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    pieces = alphabet + [c + "</w>" for c in alphabet] + ["".join(pair) for pair in merges]
    pieces = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    text = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)
    (folder / "merges.txt").write_text(text, encoding="utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=LENGTH)
    for word in words():
        if len(tokenizer(word)["input_ids"]) != 3:
            raise AssertionError(f"{word!r} is not one token: {tokenizer.tokenize(word)}")
    return tokenizer


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A fresh two-layer text encoder."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_unet() -> UNet2DConditionModel:
    """A fresh denoiser of latents of 16 x 16 x 8."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        block_out_channels=(64, 128, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def make_scheduler() -> DDIMScheduler:
    """Linear betas, v-prediction."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def assemble(
    unet: UNet2DConditionModel, text: CLIPTextModel, tokenizer: CLIPTokenizer, vae: AutoencoderKL
) -> StableDiffusionPipeline:
    """The pipeline from its parts."""
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def ids(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids padded as pipelines pad, (n, LENGTH)."""
    found: torch.Tensor = tokenizer(
        captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
    return found
