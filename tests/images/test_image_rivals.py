"""Contestants that diffusers loads: the same pictures as by its loaders, by hand or from weights put in by hand."""

from __future__ import annotations

import copy
import json
import pipes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loraweave as lw
from loraweave.errors import LoraweaveError, LoraweaveWarning
from loraweave.integrations.rivals import custom_diffusion, dreambooth, svdiff, textual_inversion

CUSTOM = "pytorch_custom_diffusion_weights.safetensors"


@pytest.fixture
def pipe() -> Any:
    return pipes.make("sd15")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def state(pipe: Any) -> dict[str, Any]:
    """Everything that must be as before, compared bit for bit."""
    found: dict[str, Any] = {"tokens": len(pipe.tokenizer), "vocabulary": pipe.tokenizer.get_vocab()}
    found |= {"config": dict(pipe.config), "size": pipe.text_encoder.config.vocab_size}
    found["processors"] = [(name, id(one)) for name, one in pipe.unet.attn_processors.items()]
    for name, part in pipe.components.items():
        found[name] = id(part)
        if isinstance(part, nn.Module):
            found |= {f"{name}.{key}": value.numpy().tobytes() for key, value in part.state_dict().items()}
    return found


def same_again(pipe: Any, block: Callable[[], Any], prompt: str) -> Tensor:
    """The picture within the block, which must leave no trace."""
    before, bare = state(pipe), pipes.latents(pipe, prompt=prompt)
    with block():
        painted = pipes.latents(pipe, prompt=prompt)
    assert state(pipe) == before
    assert torch.equal(pipes.latents(pipe, prompt=prompt), bare)
    with pytest.raises(KeyError), block():
        raise KeyError
    assert state(pipe) == before
    assert (painted - bare).abs().max() > 1e-3
    return painted


def test_textual_inversion_paints_as_through_diffusers(pipe: Any, tmp_path: Path) -> None:
    save_file({"whatever": random(3, 16)}, tmp_path / "hero.safetensors")
    (tmp_path / "coat").mkdir()
    save_file({"<coat>": random(16, seed=1)}, tmp_path / "coat" / "learned_embeds.safetensors")
    sources = {"<hero>": tmp_path / "hero.safetensors", "<coat>": tmp_path / "coat"}
    prompt = "<hero> in <coat>"
    before = torch.random.get_rng_state()
    painted = same_again(pipe, lambda: textual_inversion(pipe, sources), prompt)
    assert torch.equal(torch.random.get_rng_state(), before)
    hand = copy.deepcopy(pipe)
    hand.load_textual_inversion(str(tmp_path / "hero.safetensors"), token="<hero>")
    hand.load_textual_inversion(str(tmp_path / "coat"))
    assert torch.equal(painted, pipes.latents(hand, prompt=prompt))
    # Without diffusers: the vectors in the place of three and one other words.
    swapped = copy.deepcopy(pipe)
    words = swapped.text_encoder.get_input_embeddings().weight.data
    ids = swapped.tokenizer("x y z in w").input_ids
    words[ids[1:4]], words[ids[-2]] = random(3, 16).double(), random(16, seed=1).double()
    torch.testing.assert_close(painted, pipes.latents(swapped, prompt="x y z in w"))


def test_both_text_encoders_of_sdxl_get_their_vectors(tmp_path: Path) -> None:
    pipe = pipes.make("sdxl")
    pipe.unet.double()
    save_file({"clip_l": random(2, 16), "clip_g": random(2, 16, seed=1)}, tmp_path / "hero.safetensors")
    with textual_inversion(pipe, {"<hero>": tmp_path / "hero.safetensors"}):
        painted = pipes.latents(pipe, prompt="<hero>")
    for part, seed in (("text_encoder", 0), ("text_encoder_2", 1)):
        getattr(pipe, part).get_input_embeddings().weight.data[pipe.tokenizer("x y").input_ids[1:3]] = random(
            2, 16, seed=seed
        ).double()
    torch.testing.assert_close(painted, pipes.latents(pipe, prompt="x y"))
    save_file({"<hero>": random(2, 16)}, tmp_path / "one.safetensors")
    with pytest.raises(LoraweaveError, match="expected the tensors clip_l, clip_g, got 1"):
        textual_inversion(pipe, {"<hero>": tmp_path / "one.safetensors"})


def test_textual_inversions_that_do_not_fit(pipe: Any, tmp_path: Path) -> None:
    def refused(tensors: dict[str, Tensor], said: str, token: str = "<hero>") -> None:
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(LoraweaveError, match=said):
            textual_inversion(pipe, {token: tmp_path / "x.safetensors"})

    before = state(pipe)
    refused({"a": random(3, 24)}, r"tensor 'a' is F32 \[3, 24\], expected \[16\], or 1 to 10 such vectors")
    refused({"a": random(11, 16)}, r"expected \[16\], or 1 to 10")
    refused({"a": random(0, 16)}, r"expected \[16\], or 1 to 10")
    refused({"a": random(1, 1, 16)}, r"expected \[16\], or 1 to 10")
    refused({"a": random(16).long()}, r"is I64 \[16\]")
    refused({"a": random(16), "b": random(16)}, r"expected one tensor, got 2 \(a, b\)")
    refused({"a": random(16) / 0}, "expected finite numbers")
    refused({"a": random(16)}, "but 'a' is taken", token="a")
    refused({"a": random(16)}, "'' is taken, empty", token="")
    both = {"<a>_1": tmp_path / "y.safetensors", "<a>": tmp_path / "y.safetensors"}
    save_file({"y": random(2, 16)}, tmp_path / "y.safetensors")
    with pytest.raises(LoraweaveError, match="but '<a>_1' is taken"):
        textual_inversion(pipe, both)
    # <a> <a>_1 would go on with <a>_2, another's word.
    with pytest.raises(LoraweaveError, match="but '<a>_2' is taken"):
        textual_inversion(pipe, dict.fromkeys(("<a>", "<a>_2"), tmp_path / "y.safetensors"))
    pipe.tokenizer.add_tokens("<there>")
    refused({"a": random(16)}, "but '<there>' is taken.*such as '<there-1>'", token="<there>")
    pipe.tokenizer = pipes.clip_tokenizer()
    assert len(pipe.tokenizer) == before["tokens"]
    torch.save({"<hero>": random(16)}, tmp_path / "learned_embeds.bin")
    for place in (tmp_path, tmp_path / "learned_embeds.bin"):
        with pytest.raises(LoraweaveError, match=r"learned_embeds\.bin: pickled weights are refused"):
            textual_inversion(pipe, {"<hero>": place})
    (tmp_path / "disguised.safetensors").write_bytes((tmp_path / "learned_embeds.bin").read_bytes())
    with pytest.raises(LoraweaveError, match="pickled weights are refused"):
        textual_inversion(pipe, {"<hero>": tmp_path / "disguised.safetensors"})
    with pytest.raises(LoraweaveError, match=r"nowhere\.safetensors: cannot be read"):
        textual_inversion(pipe, {"<hero>": tmp_path / "nowhere.safetensors"})
    with pytest.raises(LoraweaveError, match="StableDiffusion3Pipeline: diffusers loads no"):
        textual_inversion(pipes.make("sd3"), {"<hero>": tmp_path / "x.safetensors"})


def custom(pipe: Any, folder: Path, *, queries: bool) -> dict[str, Tensor]:
    """A folder as diffusers' training script saves it: processors by diffusers' own saver, and one new word."""
    from diffusers.models.attention_processor import CustomDiffusionAttnProcessor

    own = dict(pipe.unet.attn_processors)
    made: dict[str, nn.Module] = {}
    for number, name in enumerate(own):
        attention = pipe.unet.get_submodule(name.removesuffix(".processor"))
        crossing = name.endswith("attn2.processor")
        hidden, text = attention.to_k.weight.shape
        made[name] = CustomDiffusionAttnProcessor(
            train_kv=crossing, train_q_out=crossing and queries, hidden_size=hidden, cross_attention_dim=text
        )
        for n, parameter in enumerate(made[name].parameters()):
            parameter.data = random(*parameter.shape, seed=10 * number + n) / parameter.shape[-1] ** 0.5
    pipe.unet.set_attn_processor(dict(made))
    pipe.unet.save_attn_procs(folder)
    pipe.unet.set_attn_processor(own)
    save_file({"<new1>": random(16, seed=99)}, folder / "<new1>.safetensors")
    return load_file(folder / CUSTOM)


@pytest.mark.parametrize("queries", [False, True])
def test_custom_diffusion_paints_as_its_weights_by_hand(queries: bool, pipe: Any, tmp_path: Path) -> None:
    tensors = custom(pipe, tmp_path, queries=queries)
    assert len(tensors) == (20 if queries else 8)
    painted = same_again(pipe, lambda: custom_diffusion(pipe, tmp_path), "<new1> hero")
    hand = copy.deepcopy(pipe)
    for key, tensor in tensors.items():
        layer, _, name = key.partition(".processor.")
        module = hand.unet.get_submodule(f"{layer}.{name.replace('_custom_diffusion', '').rpartition('.')[0]}")
        getattr(module, key.rpartition(".")[2]).data = tensor.double()
    hand.load_textual_inversion(str(tmp_path), weight_name="<new1>.safetensors")
    torch.testing.assert_close(painted, pipes.latents(hand, prompt="<new1> hero"))


def test_custom_diffusion_that_does_not_fit(pipe: Any, tmp_path: Path) -> None:
    tensors = custom(pipe, tmp_path, queries=False)
    first = next(iter(tensors))

    def refused(changed: dict[str, Tensor], said: str) -> None:
        save_file(changed, tmp_path / CUSTOM)
        with pytest.raises(LoraweaveError, match=said):
            custom_diffusion(pipe, tmp_path)

    refused({**tensors, first: random(8, 24)}, r"is F32 \[8, 24\], the UNet's attention layers have \[")
    refused({k: v for k, v in tensors.items() if k != first}, f"tensors are missing: {first}")
    refused({**tensors, f"x{first}": random(1)}, "has no place in the UNet's attention layers")
    refused({}, "there are no tensors in it")
    refused({**tensors, first: tensors[first] * float("nan")}, "expected finite numbers")
    save_file(tensors, tmp_path / CUSTOM)
    save_file({"<new1>": random(24)}, tmp_path / "<new1>.safetensors")
    with pytest.raises(LoraweaveError, match=r"<new1>\.safetensors: tensor '<new1>' is F32 \[24\]"):
        custom_diffusion(pipe, tmp_path)
    (tmp_path / "<new1>.safetensors").unlink()
    torch.save({"<new1>": random(16)}, tmp_path / "<new1>.bin")
    with pytest.raises(LoraweaveError, match=r"<new1>\.bin: pickled weights are refused"):
        custom_diffusion(pipe, tmp_path)
    (tmp_path / CUSTOM).unlink()
    with pytest.raises(LoraweaveError, match=f"expected a file {CUSTOM}"):
        custom_diffusion(pipe, tmp_path)
    with pytest.raises(LoraweaveError, match="expected the folder that holds"):
        custom_diffusion(pipe, tmp_path / "<new1>.bin")
    with pytest.raises(LoraweaveError, match="FluxPipeline: Custom Diffusion is for pipelines with a UNet"):
        custom_diffusion(pipes.make("flux"), tmp_path)


def trained(pipe: Any, folder: Path) -> Any:
    """The pipeline after further training, saved."""
    other = copy.deepcopy(pipe)
    for n, part in enumerate((other.unet, other.text_encoder)):
        for m, parameter in enumerate(part.parameters()):
            parameter.data += 0.1 * random(*parameter.shape, seed=1000 * n + m).double()
    other.save_pretrained(folder)
    return other


def test_dreambooth_checkpoints_paint_as_through_diffusers(pipe: Any, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    trained(pipe, tmp_path)
    painted = same_again(pipe, lambda: dreambooth(pipe, tmp_path), "sks hero")
    hand = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None).to(torch.float64)
    hand.scheduler = copy.deepcopy(pipe.scheduler)
    hand.set_progress_bar_config(disable=True)
    assert torch.equal(painted, pipes.latents(hand, prompt="sks hero"))
    # A UNet alone: the base's text encoder stays.
    alone = same_again(pipe, lambda: dreambooth(pipe, tmp_path / "unet"), "sks hero")
    hand = copy.deepcopy(pipe)
    hand.unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet").double()
    assert torch.equal(alone, pipes.latents(hand, prompt="sks hero"))
    assert not torch.equal(alone, painted)
    # Weights in several files, as large ones are saved, and a transformer.
    hand.unet.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    with dreambooth(pipe, tmp_path / "sharded"):
        assert torch.equal(pipes.latents(pipe, prompt="sks hero"), alone)
    index = next((tmp_path / "sharded").glob("*.index.json"))
    for name in ("../unet/diffusion_pytorch_model.safetensors", "weights.bin", 3):
        index.write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))
        with pytest.raises(LoraweaveError, match="expected names of safetensors files in its folder, got"):
            dreambooth(pipe, tmp_path / "sharded")
    index.write_text("[]")
    with pytest.raises(LoraweaveError, match="cannot be read as the index of weights"):
        dreambooth(pipe, tmp_path / "sharded")
    flux = pipes.make("flux")
    flux.transformer.float().double()  # diffusers reads its models in single precision
    bare = pipes.latents(flux)
    flux.transformer.save_pretrained(tmp_path / "flux")
    weight = next(flux.transformer.parameters()).data
    weight += 1
    with dreambooth(flux, tmp_path / "flux"):
        assert torch.equal(pipes.latents(flux), bare)
    assert not torch.equal(pipes.latents(flux), bare)


def test_dreambooth_checkpoints_that_do_not_fit(pipe: Any, tmp_path: Path) -> None:
    trained(pipe, tmp_path)
    path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)

    def refused(changed: dict[str, Tensor], said: str) -> None:
        save_file(changed, path)
        with pytest.raises(LoraweaveError, match=said):
            dreambooth(pipe, tmp_path)

    refused(
        {**tensors, "conv_in.weight": random(8, 9, 3, 3)},
        r"'conv_in.weight' has the shape \[8, 9, 3, 3\], the pipeline's unet has \[8, 4, 3, 3\]",
    )
    refused({k: v for k, v in tensors.items() if k != "conv_in.weight"}, r"expected the \d+ tensors of the .* unet")
    # As many of the same shapes, but not called as the UNet's: seen when it is loaded, and nothing is changed.
    save_file({k.replace("conv_in", "conv_inn"): v for k, v in tensors.items()}, path)
    before = state(pipe)
    with pytest.raises(LoraweaveError, match=r"conv_in"), dreambooth(pipe, tmp_path):
        pass
    assert state(pipe) == before
    path.write_bytes(b"12")
    with pytest.raises(LoraweaveError, match="truncated"):
        dreambooth(pipe, tmp_path)
    path.unlink()
    torch.save(tensors, path.with_suffix(".bin"))
    for place in (tmp_path, tmp_path / "unet"):
        with pytest.raises(LoraweaveError, match=r"diffusion_pytorch_model\.bin: pickled weights are refused"):
            dreambooth(pipe, place)
    (tmp_path / "unet" / "adapter_config.json").write_text("{}")
    with pytest.raises(LoraweaveError, match=r"there is an adapter"):
        dreambooth(pipe, tmp_path)
    with pytest.raises(LoraweaveError, match=r"expected the folder of a pipeline .* or of a unet"):
        dreambooth(pipe, tmp_path / "nowhere")


def test_text_encoders_of_older_libraries_are_read(pipe: Any, tmp_path: Path) -> None:
    """Their tensors had a prefix more, and the positions beside them."""
    trained(pipe, tmp_path)
    path = tmp_path / "text_encoder" / "model.safetensors"
    with dreambooth(pipe, tmp_path):
        painted = pipes.latents(pipe)
    old = {f"text_model.{key}": tensor for key, tensor in load_file(path).items()}
    save_file({**old, "text_model.embeddings.position_ids": torch.arange(12)[None]}, path, metadata={"format": "pt"})
    with dreambooth(pipe, tmp_path):
        assert torch.equal(pipes.latents(pipe), painted)


def test_shifts_of_both_models_add_up(pipe: Any, tmp_path: Path) -> None:
    encoder = "encoder.layers.0.mlp.fc1"
    for n, name in enumerate(("hero", "coat")):
        (tmp_path / name).mkdir()
        save_file({"conv_in.delta": random(8, seed=n)}, tmp_path / name / "spectral_shifts.safetensors")
    save_file({f"{encoder}.delta": random(16)}, tmp_path / "coat" / "spectral_shifts_te.safetensors")
    painted = same_again(pipe, lambda: svdiff(pipe, [tmp_path / "hero", tmp_path / "coat"]), "hero")
    hand = copy.deepcopy(pipe)
    moves = ((hand.unet.conv_in, random(8) + random(8, seed=1)), (hand.text_encoder.get_submodule(encoder), random(16)))
    for module, delta in moves:
        U, S, V = torch.linalg.svd(module.weight.data.flatten(1), full_matrices=False)
        module.weight.data = (U @ torch.diag((S + delta).clamp(min=0)) @ V).view(module.weight.shape)
    torch.testing.assert_close(painted, pipes.latents(hand, prompt="hero"), atol=1e-6, rtol=1e-5)
    save_file({"conv_in.delta": random(7)}, tmp_path / "hero" / "spectral_shifts.safetensors")
    with pytest.raises(LoraweaveError, match="conv_in: expected 8 shifts"):
        svdiff(pipe, [tmp_path / "hero"])
    with pytest.raises(LoraweaveError, match="expected at least one file"):
        svdiff(pipe, [])


def test_pipelines_in_use_are_refused(pipe: Any, attach: Any, sets: Any, tmp_path: Path) -> None:
    files = sets("sd15").files
    attach(pipe, {"hero": files["hero"]}, lw.Sum())
    for load, source in (
        (textual_inversion, {"<a>": tmp_path}),
        (custom_diffusion, tmp_path),
        (dreambooth, tmp_path),
        (svdiff, [tmp_path]),
    ):
        with pytest.raises(LoraweaveError, match=r"experts are attached to .+; call mixture\.detach"):
            load(pipe, source)


def test_prompts_without_the_words(pipe: Any, tmp_path: Path) -> None:
    save_file({"a": random(16)}, tmp_path / "x.safetensors")
    loading = textual_inversion(pipe, {"<hero>": tmp_path / "x.safetensors"})
    with pytest.warns(LoraweaveWarning, match=r"mine: 1 of 2 prompts have none of its words \(<hero>\), as 'a coat'"):
        loading.warn_of_tokens("mine", ["a <HERO>", "a coat"])
