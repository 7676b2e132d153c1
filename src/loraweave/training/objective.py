"""The balance loss over all sites (MoLE Eq. 14-15), and what the logs say of the gates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loraweave.mixing.numerics import balance_loss
from loraweave.mixing.site import Site


def site_shares(site: Site) -> Tensor:
    """``[E]``: each expert's mean share at one site in its last pass, over rows and real tokens; sums to one."""
    return _mean(site, _shares(site))


def mean_shares(sites: Sequence[Site]) -> Tensor:
    """``[E]``: the mean of :func:`site_shares` over sites, which may be on several devices; on that of the last."""
    shares = [site_shares(site) for site in sites]
    return torch.stack([share.to(shares[-1].device) for share in shares]).mean(0)


def balance(sites: Sequence[Site]) -> Tensor:
    """The balance loss of the last pass: ``-log prod_i q_i``, ``q_i`` the mean share of expert i over the sites."""
    return balance_loss(mean_shares(sites))


def entropy(site: Site) -> Tensor:
    """Mean entropy of the weights' distribution at one site in its last pass (nats); ``log N`` is uniform."""
    p = _shares(site)
    return _mean(site, -(p * p.clamp(min=1e-20).log()).sum(-1, keepdim=True))[0]


def _shares(site: Site) -> Tensor:
    assert site.current is not None, f"gate site {site.name} has not run"
    g = site.current.dense.float().abs()  # a weight below zero counts by its size
    return g / g.sum(-1, keepdim=True).clamp(min=1e-20)


def _mean(site: Site, values: Tensor) -> Tensor:
    mask = site.stream.mask
    if mask is None or mask.shape != values.shape[:2]:
        return values.mean((0, 1))
    kept = mask.to(values).unsqueeze(-1)
    return (values * kept).sum((0, 1)) / kept.sum().clamp(min=1)
