"""Building the gate sites of a policy over attached layers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from loraweave.errors import LoraweaveError
from loraweave.mixing import numerics
from loraweave.mixing.anatomy import Anatomy
from loraweave.mixing.attach import features
from loraweave.mixing.layer import MixingLayer
from loraweave.mixing.site import Site, first_of_streams, group
from loraweave.mixing.stream import Stream
from loraweave.mixing.types import Policy, SitePlan


def build_sites(
    layers: dict[str, MixingLayer],
    anatomy: Anatomy,
    streams: Mapping[str, Stream],
    experts: tuple[str, ...],
    policy: Policy,
) -> tuple[Site, ...]:
    """The policy's sites with fresh gates, not bound to the layers yet.

    Args:
        layers: module path -> mixing layer.
        anatomy: of the host model.
        streams: by name.
        experts: names, in order.
        policy: how they are mixed.

    Raises:
        LoraweaveError: the policy does not go with this model or these experts.
    """
    if isinstance(policy, type) or not hasattr(policy, "mix"):
        shown = policy.__name__ if isinstance(policy, type) else repr(policy)
        raise LoraweaveError(f"policy: expected a method such as lw.Sum() or lw.MoLE(), got {shown}")
    if policy.mix == "outputs" and anatomy.staging is not None:
        raise LoraweaveError(
            "mix='outputs' is for language models; over a diffusers pipeline use mix='deltas' (the default)"
        )
    places = [anatomy.place(path) for path in layers]
    specs = {spec.name: spec for spec in anatomy.streams}
    sites = []
    grouped = group(places, policy.granularity, getattr(policy, "reads_ahead", False))
    firsts = first_of_streams(grouped)
    for name, members in grouped.items():
        leader, spec = layers[members[0].path], specs[members[0].stream]
        width = features(leader.base)
        assert width is not None
        plan = SitePlan(
            name=name,
            stream=spec.name,
            members=tuple(place.path for place in members),
            block=members[0].block,
            bank=leader.bank,
            causal=spec.causal,
            prompted=spec.prompted,
            features=width,
            experts=experts,
            width=anatomy.width,
            ahead=any(place.stream != members[0].stream for place in members),
            spatial=spec.spatial,
            first=name in firsts,
        )
        site = Site(plan, layers, streams[spec.name])
        site.gate = policy.gate(plan)
        if site.gate is None and anatomy.staging is None and policy.constant(plan) is None:
            raise LoraweaveError(
                f"the method {policy.name!r} follows the steps of a denoising run; attach to a diffusers pipeline"
            )
        sites.append(site)
    check = getattr(policy, "check", None)
    if check is not None:
        check([site.plan for site in sites])
    return tuple(sites)


def constant_weights(policy: Policy, plan: SitePlan, kept: Tensor | None) -> Tensor | None:
    """``[E]``, the policy's constant weights at a site among the experts kept; ``None`` if they are not constant.

    Raises:
        LoraweaveError: the experts kept have no weight to share out.
    """
    weights = policy.constant(plan)
    if weights is None or kept is None:
        return weights
    if not policy.normalized:
        return weights * kept
    if float((weights * kept).sum()) == 0:
        names = ", ".join(name for name, keep in zip(plan.experts, kept, strict=True) if keep)
        raise LoraweaveError(f"the experts kept ({names}) have weight 0 at {plan.name}; nothing would be left")
    return numerics.renormalize(weights, kept)
