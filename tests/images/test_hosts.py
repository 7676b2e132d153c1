"""Pipelines as their users run them: compiled, offloaded, sliced; and denoisers that are called in another way."""

from __future__ import annotations

import copy
import pipes
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from torch.testing import assert_close

import loraweave as lw

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.mark.slow
@pytest.mark.parametrize("policy", [lw.Sum(0.5), lw.Composite()], ids=lambda policy: policy.name)
def test_a_compiled_denoiser_gives_the_same_pictures(policy: Any, textless: Any) -> None:
    made, files, _ = textless("sd15")
    pipe, two = copy.deepcopy(made), {name: files[name] for name in ("hero", "coat")}
    mixture = lw.attach(pipe, two, policy)
    expected = pipes.latents(pipe)
    torch.compiler.reset()
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    pipe.unet = torch.compile(pipe.unet, backend=backend)
    assert_close(pipes.latents(pipe), expected, **CLOSE)
    assert max(graphs) > 500, "the UNet is not in one piece"
    compiled = len(graphs)
    assert_close(pipes.latents(pipe), expected, **CLOSE)
    assert len(graphs) == compiled
    mixture.detach()
    torch.compiler.reset()


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_offloaded_and_sliced_pipelines(whole: bool, first: bool, sets: Any) -> None:
    """What ``enable_model_cpu_offload`` (whole models) and ``enable_sequential_cpu_offload`` do, here without a GPU."""
    made, files, _ = sets("sd15")
    mixture = lw.attach(made, files, lw.Composite())
    expected = pipes.latents(made)
    mixture.detach()
    bare = pipes.latents(made)
    pipe = copy.deepcopy(made)

    def offload() -> None:
        for part in (pipe.text_encoder, pipe.unet, pipe.vae):
            if whole:
                accelerate.cpu_offload_with_hook(part, "cpu")
            else:
                accelerate.cpu_offload(part, torch.device("cpu"))
        pipe.enable_attention_slicing(1)

    if first:
        offload()
    mixture = lw.attach(pipe, files, lw.Composite())
    if not first:
        offload()
    assert_close(pipes.latents(pipe), expected, **CLOSE)
    mixture.detach()
    assert_close(pipes.latents(pipe), bare, **CLOSE)


def test_a_denoiser_that_is_called_with_a_list_of_pictures() -> None:
    torch.manual_seed(0)
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=16, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=8,
        axes_dims=[2, 2, 4], axes_lens=[64, 16, 16],
    ).eval()  # fmt: skip
    for parameter in transformer.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.3)
    pipe = diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=pipes.vae(), text_encoder=None, tokenizer=None,
        transformer=transformer,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    prompt = [torch.randn(5, 8)]

    def picture() -> torch.Tensor:
        options = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "latent", "guidance_scale": 3.0}
        given = {"prompt": None, "prompt_embeds": prompt, "negative_prompt_embeds": [torch.zeros(5, 8)]}
        made: torch.Tensor = pipe(**given, **options, generator=torch.Generator().manual_seed(0)).images
        return made

    bare = picture()
    modules = pipes.targets(pipe, ("to_q", "to_v"))
    factors = {path: lw.LoraFactors(a, b, 1.0) for path, (a, b) in pipes.factors(modules, 0, 2).items()}
    mixture = lw.attach(pipe, {"one": lw.Expert("one", factors)}, lw.Sum())
    mixed = picture()
    mixture.fold()
    assert_close(picture(), mixed, atol=1e-3, rtol=1e-3)
    mixture.unfold()
    assert (mixed - bare).abs().max() > 1
    mixture.policy = lw.Switch(every=1)
    assert_close(picture(), mixed, atol=1e-3, rtol=1e-3)  # every turn is the one expert's
    mixture.policy = lw.Composite()
    with pytest.raises(lw.LoraweaveError, match="'x' is list, expected a tensor of rows; 'composite' cannot"):
        picture()
    mixture.detach()
    assert torch.equal(picture(), bare)


POLICIES = {
    "sum": lw.Sum(0.0, {"hero": 1.0, "ink": 0.5}), "schedule": lw.Sum(weights={"coat": "0@0,1@1"}),
    "switch": lw.Switch(every=1, stop=0.7), "composite": lw.Composite(), "chunks": lw.Composite(chunk=2),
    "regional": lw.Regional({"ink": None, "hero": (0, 0, 0.5, 1)}), "gates": lw.MoLE(),
    "learned": lw.CAT(), "arrow": lw.Arrow(),
}  # fmt: skip


@pytest.mark.parametrize(("name", "first"), [*((name, False) for name in POLICIES), ("gates", True)])
def test_offloading_goes_with_every_method(name: str, first: bool, sets: Any) -> None:
    """Offloaded parameters stand on no device between two calls of their own module, gates' parameters too."""
    made, files, _ = sets("sd15")
    masks = [(), ("coat",)] if name in ("gates", "learned", "arrow") else [()]
    expected = []
    mixture = lw.attach(made, files, POLICIES[name])
    for masked in masks:
        with mixture.without(*masked):
            expected.append(pipes.latents(made))
    mixture.detach()
    pipe = copy.deepcopy(made)
    mixture = None if first else lw.attach(pipe, files, POLICIES[name])
    for part in (pipe.text_encoder, pipe.unet, pipe.vae):
        accelerate.cpu_offload(part, torch.device("cpu"))
    mixture = mixture or lw.attach(pipe, files, POLICIES[name])
    for masked, picture in zip(masks, expected, strict=True):
        with mixture.without(*masked):
            assert_close(pipes.latents(pipe), picture, **CLOSE)
    assert all(weight.is_meta for layer in mixture.layers.values() for weight in layer.base.parameters())


# Gates that read their input ask about autocast, which the meta device does not know.
@pytest.mark.parametrize("name", sorted(POLICIES.keys() - {"gates", "arrow"}))
def test_low_rank_terms_follow_accelerate_to_another_device(name: str, sets: Any) -> None:
    """The meta device stands for the GPU: to it ``cpu_offload`` moves the banks, tensor by tensor."""
    made, files, _ = sets("sd15")
    pipe = copy.deepcopy(made)
    mixture = lw.attach(pipe, files, POLICIES[name])
    accelerate.cpu_offload(pipe.unet, torch.device("meta"))
    layers = [layer for path, layer in mixture.layers.items() if path.startswith("unet.")]
    assert all(layer.bank.A.is_meta and layer.bank.Bt.is_meta for layer in layers)
    pipe.scheduler.set_timesteps(2)
    sample, prompt = torch.zeros(2, 4, 8, 8, device="meta"), torch.zeros(2, 12, 16, device="meta")
    out = pipe.unet(sample.double(), pipe.scheduler.timesteps[0], prompt.double()).sample
    assert (out.is_meta, out.shape) == (True, sample.shape)
    terms = [term for layer in layers for term in (layer.copies or (layer.fixed,)) if term is not None]
    assert all(one is None or one.is_meta for term in terms for one in (term.A, term.Bt, term.w))
    assert terms or mixture.gates


def test_accelerate_takes_its_hooks_back(sets: Any) -> None:
    """As every later ``enable_model_cpu_offload`` and ``remove_all_hooks`` of the pipeline asks it to."""
    made, files, _ = sets("sd15")
    for first in (True, False):
        pipe = copy.deepcopy(made)
        bare = pipes.latents(pipe)
        mixture = None if first else lw.attach(pipe, files, lw.Sum())
        accelerate.cpu_offload(pipe.unet, torch.device("cpu"))
        mixture = mixture or lw.attach(pipe, files, lw.Sum())
        mixed = pipes.latents(pipe)
        pipe.remove_all_hooks()
        assert not any(weight.is_meta for weight in pipe.unet.parameters())
        assert_close(pipes.latents(pipe), mixed, **CLOSE)
        mixture.detach()
        assert_close(pipes.latents(pipe), bare, **CLOSE)


def test_weights_offloaded_while_folded_are_not_unfolded_by_halves(sets: Any) -> None:
    made, files, _ = sets("sd15")
    pipe = copy.deepcopy(made)
    bare = pipes.latents(pipe)
    mixture = lw.attach(pipe, files, lw.Sum())
    mixture.fold()
    mixed = pipes.latents(pipe)
    accelerate.cpu_offload(pipe.unet, torch.device("cpu"))
    for leave in (mixture.unfold, mixture.detach):
        with pytest.raises(lw.LoraweaveError, match=r"offloaded after folding; take the offloading back first"):
            leave()
        assert_close(pipes.latents(pipe), mixed, **CLOSE)
    pipe.remove_all_hooks()
    mixture.detach()
    assert_close(pipes.latents(pipe), bare, **CLOSE)
